"""Start clusters, share them, and stop each when its last user is done.

A cluster is started from a manifest, which stores its name and options in Polars Cloud. Polars
Cloud runs at most one cluster per manifest, so a start can be repeated safely. After a cluster has
stopped, the next start creates a new cluster from the same manifest.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.sdk import Asset, get_current_context, task

from .cloud.client import (
    SPEC,
    default_context,
    get_cluster_id,
    get_cluster_status,
    get_size,
    send_queries_through,
    start_without_waiting,
    was_available,
)
from .cloud.manifests import Cluster, register_manifest
from .cloud.queries import open_own_cluster
from .errors import ClusterNotStartedError, ClusterRefusedError
from .ownership.costs import Cost, describe_unknown
from .ownership.end import end_use, has_other_users, log_failures
from .ownership.record import ClusterUse, get_use
from .ownership.scope import TaskScope, current_scope, task_scope
from .queries import RecordingClient
from .query_tasks import query_task
from .waiting.deferral import check_deadline, defer_until_started
from .waiting.in_worker import check_all_awaited

if TYPE_CHECKING:
    from polars_cloud import ComputeContext

logger = logging.getLogger(__name__)

OPTIONS = {"name", *SPEC, "insecure", "labels"}
"""Options of a cluster: all options of `ComputeContext` except the workspace."""

START_POLL_SECONDS = 1.0
"""Poll interval of the worker for a cluster that is starting, in seconds."""


@contextmanager
def use_cluster(cluster: Cluster, *, stop: bool = True) -> Iterator[ComputeContext]:
    """Use a cluster inside a `with` block; its last user stops it when the block ends.

    The first query starts the cluster if it is not running. Every query on the context is recorded
    before it is submitted, and is canceled if the task ends first. In a `@query_task` the use lasts
    until the returned queries have ended. If the worker shuts down, the next try resumes the
    queries on the same cluster.

    Unlike `with ctx:`, the block never hides an exception of its body, and does not fail if the
    cluster has already stopped.

    Parameters
    ----------
    cluster
        dict with the manifest's `name` and options of `polars_cloud.ComputeContext`: `cpus`,
        `memory`, `cluster_size`, `idle_timeout_mins`, ... The manifest is registered if it does not
        exist. For a cluster of your own, a dict with only the scheduler's `uri`; the cluster is
        then neither started nor stopped.
    stop
        If False, the cluster is left to its idle timeout.

    Yields
    ------
    polars_cloud.ComputeContext
        Context of the cluster. It is also the default context of the block: `lf.remote()` without
        arguments uses it, except in other threads.

    Raises
    ------
    NotAuthenticatedError
        The task has no `@authenticate`.
    WorkspaceNotFoundError
        The account has no workspace `POLARS_CLOUD_WORKSPACE`.
    ClusterRefusedError
        `cluster` has no name, or an option that does not exist or is not supported.
    ValueError
        Polars Cloud refused the options.
    QueryNotAwaitedError
        The block ended, and the task has not waited for one of its queries.
    """
    check_cluster(cluster)
    scope = current_scope()
    use: ClusterUse | None = None
    if "uri" in cluster:
        scope.clusters.check_open(cluster["uri"])
        ctx = open_own_cluster(scope.session, cluster["uri"])
        client = RecordingClient(scope, ctx, cluster["uri"], lambda ctx: None)
    else:
        use = ClusterUse(scope.record.owner, scope.record.conn_id, cluster["name"], stops=stop)
        with scope.clusters.lock_manifest(use.manifest):
            ctx = _open_use(scope, use, cluster)
            scope.clusters.open_block(use.manifest)
        client = RecordingClient(scope, ctx, use.manifest, functools.partial(start_and_wait, scope))
    send_queries_through(client, ctx)
    try:
        with default_context(ctx):
            yield ctx
        client.close()
        if not scope.can_return_queries:
            check_all_awaited(scope, client.names)
        elif scope.queries.get_unended(client.names):
            return  # the cluster is used until the task ends
    except BaseException as error:
        client.close()
        if scope.is_finished_by(error):
            scope.clusters.close_block(use, ctx, client.names, error)
        raise
    scope.clusters.close_block(use, ctx, client.names)


def ensure_manifest(cluster: Cluster) -> None:
    """Register the cluster's manifest if it does not exist, or again if its options have changed.

    Parameters
    ----------
    cluster
        Same as for `use_cluster`.

    Raises
    ------
    NotAuthenticatedError, WorkspaceNotFoundError, ClusterRefusedError, ValueError
        Same as for `use_cluster`.
    """
    check_cluster(cluster)
    if "uri" in cluster:
        return
    scope = current_scope()
    use = ClusterUse(scope.record.owner, scope.record.conn_id, cluster["name"])
    is_used = functools.partial(has_other_users, scope.session, use)
    register_manifest(scope.session, cluster, is_used)


@contextmanager
def shared_cluster(
    cluster: Cluster,
    *,
    conn_id: str = "polars_cloud",
    check: Callable[[], None] | None = None,
    cost: Asset | None = None,
) -> Iterator[None]:
    """Keep a cluster running while the tasks that are created inside the `with` block run.

    Creates a setup task `start_cluster` and a teardown task `stop_cluster`. The teardown runs after
    all tasks in the block have ended, including their retries. If one of these tasks fails, the run
    fails, too. `stop_cluster` logs and returns the cost of the run's use of each cluster, as a list
    of dicts. Unknown values are None; `remark` gives the reason.

    For a cluster of your own, no tasks are created and `check` is not called.

    Parameters
    ----------
    cluster
        Same as for `use_cluster`. The tasks in the block pass it to `use_cluster`.
    conn_id
        Id of the Airflow Connection.
    check
        Function that `start_cluster` calls before the start. If it raises, the task fails.
    cost
        Asset to add to the outlets of `stop_cluster`. Each event's `extra` has the returned list
        under the key `cost`.

    Raises
    ------
    ClusterRefusedError
        `cluster` has no name, or its options are not supported. Raised when the DAG file is parsed.
    """
    check_cluster(cluster)
    if "uri" in cluster:
        yield
        return

    @query_task(execution_timeout=timedelta(minutes=15))
    def start_cluster() -> None:
        if check:
            check()
        start_for_run(cluster, conn_id)

    start: Any = start_cluster()
    dag, started_by = start.operator.dag, start.operator.task_id

    @task(execution_timeout=timedelta(minutes=5), outlets=[cost] if cost else [])
    def stop_cluster() -> list[Cost]:
        costs = stop_for_run(cluster, conn_id, started_by)
        if cost:
            events: Any = get_current_context()["outlet_events"]
            events[cost].extra = {"cost": costs}
        return costs

    # `@teardown` cannot be used twice in one process: "Trigger rule not configurable".
    stop: Any = stop_cluster()
    with stop.as_teardown(setups=start) as between:
        before = set(dag.task_ids)
        yield
        for made in dag.tasks:
            if made.is_mapped and made.task_id not in before:
                between.add_task(made)  # expand() does not add the task to the block


def start_for_run(cluster: Cluster, conn_id: str) -> None:
    """Start the cluster unless it is running, and record that the run uses it."""
    with task_scope(conn_id) as scope:
        scope.begin()
        use = ClusterUse(scope.record.owner._replace(whole_run=True), conn_id, cluster["name"])
        ctx = _open_use(scope, use, cluster)
        start_and_wait(scope, ctx)
        scope.clusters.remove_use(use)  # last: a failed setup has no teardown
        logger.info("Cluster %s of manifest %s is running", get_cluster_id(ctx), use.manifest)


def stop_for_run(cluster: Cluster, conn_id: str, started_by: str) -> list[Cost]:
    """End the run's use of the cluster, and stop the cluster unless it has other users.

    Orphaned queries on the cluster are canceled first.

    Returns
    -------
    list of dict
        Cost of the run's use of each cluster.
    """
    with task_scope(conn_id) as scope:
        scope.begin()
        owner = scope.record.owner._replace(task_id=started_by, whole_run=True)
        use = ClusterUse(owner, conn_id, cluster["name"])
        if stored := get_use(use.key):
            use = stored
        else:
            logger.info(
                "This run's use of the cluster has already ended. The cost is in the log of the "
                "task, callback or orphan sweep that ended it"
            )
        left, costs = end_use(scope.session, use, waits_for_stop=True)
        log_failures(left)
        return costs or [
            describe_unknown(use, each, "the run's use of the cluster could not be ended")
            for each in use.clusters
        ]


def start_and_wait(scope: TaskScope, ctx: ComputeContext) -> None:
    """Start the cluster unless it is running, and wait until it accepts queries.

    Raises
    ------
    ClusterNotStartedError
        The cluster failed or stopped while it was starting.
    """
    session = scope.session
    if was_available(ctx):
        return
    session.call(start_without_waiting, ctx)
    scope.clusters.add_cluster(ctx)
    cluster_id = get_cluster_id(ctx)
    assert cluster_id is not None, "the cluster has been started"
    began = time.monotonic()
    while (status := session.call(ctx.get_status)).name == "STARTING":
        scope.check_killed()  # for threads, which get no signals
        check_deadline(scope)
        defer_until_started(scope, cluster_id, after=time.monotonic() - began)
        time.sleep(START_POLL_SECONDS)
    if not status.is_available():
        _, reason = session.call(get_cluster_status, cluster_id, session.find_workspace())
        raise ClusterNotStartedError(f"Cluster {cluster_id} did not start: {reason or status.name}")


def check_cluster(cluster: Cluster) -> None:
    """Raise `ClusterRefusedError` if the cluster has no name, or options that are unsupported."""
    if isinstance(cluster, Mapping) and "uri" in cluster:
        _check_own_cluster(cluster)
        return
    if not isinstance(cluster, Mapping) or not cluster.get("name"):
        raise ClusterRefusedError(
            f"A cluster needs a name, so that it can be found after its worker was killed: "
            f'write {{"name": "airflow-reports", ...}} instead of {cluster!r}'
        )
    if unknown := cluster.keys() - OPTIONS:
        raise ClusterRefusedError(
            f"Unknown cluster option {', '.join(sorted(map(str, unknown)))}: the options are "
            f"{', '.join(sorted(OPTIONS))}"
        )
    if (mode := cluster.get("connection_mode")) not in (None, "direct", "proxy"):
        raise ClusterRefusedError(
            f'Unknown connection_mode {mode!r}: write "direct", which is the default, or "proxy"'
        )


def _check_own_cluster(cluster: Cluster) -> None:
    url = urlsplit(str(cluster["uri"]))
    if url.scheme not in ("http", "https") or not url.hostname or url.username:
        raise ClusterRefusedError(
            "The uri of a cluster of your own is its scheduler's address, without a login, such as "
            "https://polars.example.com:5051"
        )
    if others := sorted(map(str, cluster.keys() - {"uri"})):
        raise ClusterRefusedError(
            f"A cluster of your own is neither started nor stopped, so it does not take "
            f"{', '.join(others)}: give only its uri, and put headers and ca_cert into the extra "
            "of the Airflow Connection"
        )


def _open_use(scope: TaskScope, use: ClusterUse, cluster: Cluster) -> ComputeContext:
    """Register the manifest, record the use of the cluster, and return its context."""
    scope.clusters.check_open(use.manifest)  # before the manifest changes
    scope.session.find_workspace()  # without a workspace, no orphan could be ended later
    is_used = functools.partial(has_other_users, scope.session, use)
    ctx = register_manifest(scope.session, cluster, is_used)
    cluster_id = get_cluster_id(ctx)
    if cluster_id:
        use.add_cluster(cluster_id, *get_size(ctx), has_started=False)
    scope.clusters.record_use(use)  # before the first query starts the cluster
    if cluster_id:
        is_used()  # cancels orphaned queries, behind which new ones would be queued
    logger.info("Using cluster %s of manifest %s", cluster_id or "(to be started)", use.manifest)
    return ctx
