"""Start and stop clusters so that none outlives its work, and none is stopped under somebody else.

In a DAG the two tasks enclose those that use the cluster:

    manifest = start_cluster("airflow-reports", {"cpus": 2, "memory": 4})
    with stop_cluster(manifest).as_teardown(setups=manifest):
        run_query(manifest)

The manifest is the handle: Polars Cloud runs at most one cluster for it, so a start can be
repeated, and whoever needs the cluster after it was stopped gets a new one by the same name.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import get_current_context, task
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.xcom import XCom

from include.auth import authenticate
from include.kills import unwind_when_killed
from include.live_clusters import find_live_cluster
from include.manifests import ensure_manifest
from include.outages import call
from include.queries import QUERIES, cancel, connect, find_status
from include.settings import WORKSPACE

if TYPE_CHECKING:
    from airflow.sdk import Context
    from polars_cloud import ComputeContext

logger = logging.getLogger(__name__)

CLUSTER = "polars_cloud_cluster"
"""Key in the task state store and of an XCom: the cluster that a task started and is to stop."""

WIND_UP = 10.0
"""Seconds for a cluster to become idle after its last query has ended."""

TASK_ENDS = {"success", "failed", "skipped", "upstream_failed", "removed"}
"""States of tasks that are neither running nor to run."""


@task(execution_timeout=timedelta(minutes=15))
@authenticate
def start_cluster(manifest: str, spec: dict[str, Any]) -> str:
    """Start the manifest's cluster unless it is running, and return the manifest's name.

    Parameters
    ----------
    manifest
        Name of the manifest; registered if need be.
    spec
        What `polars_cloud.ComputeContext` takes: `cpus`, `memory`, `cluster_size`, ...
    """
    unwind_when_killed()
    ensure_manifest(manifest, **spec)
    ctx = _named(manifest)
    try:
        call(ctx.start, timeout=None)
    except BaseException:
        # A setup that fails is never torn down.
        _stop_quietly(manifest)
        raise
    get_current_context()["ti"].xcom_push(CLUSTER, str(ctx._compute_id))
    logger.info("Cluster %s of manifest %s is running", ctx._compute_id, manifest)
    return manifest


@task(execution_timeout=timedelta(minutes=5))
@authenticate
def stop_cluster(manifest: str) -> None:
    """Stop the manifest's cluster, unless it has stopped by itself or others are using it.

    Queries of this run that have outlived their tasks are canceled first.
    """
    from polars_cloud.polars_cloud import NotFoundError

    _cancel_submitted(_pushed(QUERIES, get_current_context()))
    try:
        ctx = _named(manifest)
    except NotFoundError:
        logger.info("Manifest %s does not exist: nothing to stop", manifest)
        return
    _stop_unless_used(ctx)


def clean_up(context: Context) -> None:
    """End what the tasks of a failed run could not: the `on_failure_callback` of a DAG.

    A run that exceeds its `dagrun_timeout` skips its teardown, and a worker that is killed at a
    task's last try leaves its query behind. Airflow may call back long after the run has failed: if
    tasks were cleared since, the run goes on, and everything is left to them.
    """
    # `dag.test()` has no supervisor to ask what was left, and kills no task.
    if hasattr(task_runner, "SUPERVISOR_COMMS"):
        authenticate(_clean_up)(context)


@contextmanager
def running_cluster(ctx: ComputeContext) -> Iterator[ComputeContext]:
    """Have a cluster for the body of a `with` statement, and leave none behind that was not there.

    A cluster that runs already is used and left alone. Otherwise it is started, and stopped however
    the body ends, unless others are using it by then; a try that died without stopping its cluster
    hands it over to the next. Unlike `with ctx:` this never replaces the body's exception by one of
    its own, and is quiet when the cluster has already stopped.

    Parameters
    ----------
    ctx
        By the `name` of a manifest, or by a spec, which always starts a cluster.

    Yields
    ------
    ComputeContext
        The one to use in the body.
    """
    unwind_when_killed()
    context = get_current_context()
    ti, store = context["ti"], cast("Any", context["task_state_store"])
    started = store.get(CLUSTER)
    left_behind = None
    if started and started["try_number"] != ti.try_number:
        left_behind = call(find_live_cluster, started["cluster_id"])
    ctx = left_behind or ctx
    if not left_behind and call(ctx.get_status).is_available():
        yield ctx
        return
    try:
        call(ctx.start, timeout=None)
        cluster_id = str(ctx._compute_id)
        store.set(CLUSTER, {"cluster_id": cluster_id, "try_number": ti.try_number})
        ti.xcom_push(CLUSTER, cluster_id)
        yield ctx
    except BaseException:
        _stop_quietly(ctx)
        raise
    _stop_unless_used(ctx)


def _named(manifest: str) -> ComputeContext:
    from polars_cloud import ComputeContext

    return call(lambda: ComputeContext(workspace=WORKSPACE, name=manifest))


def _clean_up(context: Context) -> None:
    queries, clusters = list(_pushed(QUERIES, context)), list(_pushed(CLUSTER, context))
    # Asked after they were read: when no task is to run, only tries that have ended pushed them.
    if _goes_on(context):
        logger.info("Run %s goes on: nothing to clean up yet", context["run_id"])
        return
    _cancel_submitted(queries)
    for cluster_id in clusters:
        if ctx := call(find_live_cluster, cluster_id):
            _stop_unless_used(ctx)


def _goes_on(context: Context) -> bool:
    dag, run_id = context["dag"], context["run_id"]
    states = task_runner.RuntimeTaskInstance.get_task_states(dag.dag_id, run_ids=[run_id])
    return not set(states[run_id].values()) <= TASK_ENDS


def _cancel_submitted(submissions: Iterable[list[dict[str, str]]]) -> None:
    """Cancel what tasks have left running: those that were killed without a warning."""
    for submission in itertools.chain.from_iterable(submissions):
        if ctx := call(find_live_cluster, submission["cluster_id"]):
            query = connect(submission["query_id"], ctx)
            status = find_status(query)
            if status and not status.is_done():
                cancel(query)


def _pushed(key: str, context: Context) -> Iterator[Any]:
    """The XComs of a run's tasks; the mapped ones' of each."""
    dag = context["dag"]
    for task_id in dag.task_ids:
        values = XCom.get_all(key=key, dag_id=dag.dag_id, task_id=task_id, run_id=context["run_id"])
        yield from values or []


def _stop_unless_used(ctx: ComputeContext) -> None:
    deadline = time.monotonic() + WIND_UP
    while (status := call(ctx.get_status)).name == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.5)
    if status.name == "RUNNING":
        logger.info("Cluster %s is left running: others are using it", ctx._compute_id)
    elif status.is_available():
        call(ctx.stop)
        logger.info("Cluster %s stopped", ctx._compute_id)
    else:
        logger.info("Cluster %s is not running: nothing to stop", ctx._compute_id)


def _stop_quietly(cluster: ComputeContext | str) -> None:
    """Stop a context's cluster, or a manifest's, while another error is on its way."""
    try:
        _stop_unless_used(_named(cluster) if isinstance(cluster, str) else cluster)
    except Exception:
        logger.exception("The cluster could not be stopped")
