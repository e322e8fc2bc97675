"""Start and stop clusters so that none outlives the work it was started for.

In a DAG the two tasks enclose those that use the cluster:

    cluster_id = start_cluster({"cpus": 2, "memory": 4})
    with stop_cluster(cluster_id).as_teardown(setups=cluster_id):
        run_query(cluster_id)

Needs `include/auth.py` and `include/settings.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import task

from include.auth import authenticate
from include.settings import WORKSPACE

if TYPE_CHECKING:
    from polars_cloud import ComputeContext

logger = logging.getLogger(__name__)


@task(execution_timeout=timedelta(minutes=15))
@authenticate
def start_cluster(spec: dict[str, Any]) -> str:
    """Start a cluster for the tasks of a DAG and return its id.

    Parameters
    ----------
    spec
        What `polars_cloud.ComputeContext` takes: `cpus`, `memory`, `cluster_size`, ... or the
        `name` of a manifest, whose live cluster is used if there is one.
    """
    import polars_cloud as pc

    ctx = pc.ComputeContext(workspace=WORKSPACE, **spec)
    try:
        ctx.start()
    except BaseException:
        # A setup that fails is never torn down.
        _stop_quietly(ctx)
        raise
    logger.info("Cluster %s is running", ctx._compute_id)
    return str(ctx._compute_id)


@task(execution_timeout=timedelta(minutes=5))
@authenticate
def stop_cluster(cluster_id: str) -> None:
    """Stop the cluster that `start_cluster` started, unless it has stopped by itself."""
    import polars_cloud as pc

    try:
        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
    except RuntimeError as error:
        if "incorrect state" not in str(error):
            raise
        logger.info("Cluster %s is not running: nothing to stop", cluster_id)
        return
    ctx.stop()
    logger.info("Cluster %s stopped", cluster_id)


@contextmanager
def running_cluster(ctx: ComputeContext) -> Iterator[ComputeContext]:
    """Start the cluster for the body of a `with` statement and stop it however the body ends.

    Unlike `with ctx:` it never replaces the body's exception by one of its own, and is quiet when
    the cluster has already stopped.
    """
    try:
        ctx.start()
        yield ctx
    except BaseException:
        _stop_quietly(ctx)
        raise
    _stop(ctx)


def _stop(ctx: ComputeContext) -> None:
    if ctx.get_status().is_available():
        ctx.stop()
        logger.info("Cluster %s stopped", ctx._compute_id)


def _stop_quietly(ctx: ComputeContext) -> None:
    try:
        _stop(ctx)
    except Exception:
        logger.exception("Cluster %s could not be stopped", ctx._compute_id)
