"""Use clusters so that none outlives its work, and none is stopped under somebody else.

A cluster is described by a manifest, of which Polars Cloud runs one cluster at most: a start can be
repeated, and whoever comes after the cluster has stopped gets a new one by the same name. Its users
are on record; the last of them stops it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .client_internals import (
    get_cluster_id,
    look_at_cluster,
    misspecified_error,
    start_without_waiting,
)
from .data_location import check_data_location, uses_data_location
from .deferral import defer_until_started
from .ledger import Owner
from .login import call_polars_cloud
from .manifests import Cluster, ensure_manifest, find_manifest
from .releases import release
from .settings import WORKSPACE
from .task_scope import current_scope, find_scope, grace, log_errors
from .workspaces import find_workspace

if TYPE_CHECKING:
    from polars_cloud import ComputeContext

logger = logging.getLogger(__name__)

STARTING_PAUSE_SECONDS = 1.0
"""Between two looks at a cluster that is starting."""


def compute_context(cluster: Cluster) -> ComputeContext:
    """Return the context of a running cluster that nobody stops: its idle timeout does.

    The cluster is started unless it is running.

    Parameters
    ----------
    cluster
        As `use_cluster` takes it.
    """
    check_name(cluster)
    try:
        ctx = find_manifest(cluster["name"])
    except misspecified_error():
        ctx = None
    if ctx is None or get_cluster_id(ctx) is None:
        ctx = ensure_manifest(cluster)
    start_and_wait(ctx)
    return ctx


def start_and_wait(ctx: ComputeContext) -> None:
    """Start the cluster unless it is running, and wait until it accepts queries.

    Raises
    ------
    AirflowFailException
        The DAG uses the data location, and no cluster could.
    RuntimeError
        The cluster did not start.
    """
    if (scope := find_scope()) and uses_data_location(scope.task.dag):
        check_data_location()
    if not call_polars_cloud(ctx.get_status).is_available():
        call_polars_cloud(start_without_waiting, ctx)
    cluster_id = get_cluster_id(ctx)
    assert cluster_id is not None, "it was started, or is running"
    began = time.monotonic()
    while (status := call_polars_cloud(ctx.get_status)).name == "STARTING":
        defer_until_started(cluster_id, after=time.monotonic() - began)
        time.sleep(STARTING_PAUSE_SECONDS)
    if not status.is_available():
        _, reason = call_polars_cloud(look_at_cluster, cluster_id, WORKSPACE)
        raise RuntimeError(f"Cluster {cluster_id} did not start: {reason or status.name}")


@contextmanager
def use_cluster(cluster: Cluster) -> Iterator[ComputeContext]:
    """Use a cluster inside a `with` block, and stop it at the end unless others are using it.

    The cluster is started unless it is running. Unlike `with ctx:` this never replaces an
    exception of the body, and accepts that the cluster has already stopped. A try whose worker is
    shut down leaves the cluster to the next try.

    Parameters
    ----------
    cluster
        Manifest's `name`, registered if need be, and what `polars_cloud.ComputeContext` takes:
        `cpus`, `memory`, `cluster_size`, `idle_timeout_mins`, ...

    Yields
    ------
    polars_cloud.ComputeContext
        The one to use in the body.

    Raises
    ------
    ValueError
        `cluster` has no name, or Polars Cloud refused it.
    """
    check_name(cluster)
    scope = current_scope()
    name = cluster["name"]
    key = record_use(name, scope.owner)
    scope.clusters[name] += 1

    def end() -> None:
        scope.clusters[name] -= 1
        if not scope.clusters[name] and scope.is_owner():
            scope.kept.discard(key)
            release(name, scope.owner)

    try:
        ctx = compute_context(cluster)
        logger.info("Using cluster %s of manifest %s", get_cluster_id(ctx), name)
        yield ctx
        if scope.returns_queries and scope.has_unended(name):
            return  # the cluster is used until the task ends
        scope.check_that_all_were_awaited(name)
    except BaseException as error:
        if scope.is_over(error):
            with grace(error), log_errors():
                if scope.is_owner():
                    scope.end_queries(name)
                end()
        raise
    end()


def record_use(manifest: str, owner: Owner) -> str:
    """Record a use of the manifest's cluster, which ends with the task at the latest; its key.

    Raises
    ------
    AirflowFailException
        The account has no such workspace: nobody could end what is on record.
    """
    call_polars_cloud(find_workspace)
    return current_scope().use(manifest, owner)


def check_name(cluster: Cluster) -> None:
    if not isinstance(cluster, Mapping) or not cluster.get("name"):
        raise ValueError(
            f"A cluster needs a name, by which it is found again after its worker was killed: "
            f'write {{"name": "airflow-reports", ...}} instead of {cluster!r}'
        )
