"""Start clusters, share them, and stop each when its last user is done.

Each cluster has a manifest, and Polars Cloud runs at most one cluster per manifest. A start can be
repeated. After the cluster has stopped, the next start makes a new one with the same name.
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
"""Options of a cluster: those of `ComputeContext` but for the workspace."""

START_POLL_SECONDS = 1.0
"""Worker poll interval in seconds for a cluster that is starting."""


@contextmanager
def use_cluster(cluster: Cluster, *, stop: bool = True) -> Iterator[ComputeContext]:
    """Use a cluster inside a `with` block. Its last user stops it at the end.

    The first query starts the cluster unless it is running. Every query on the context is recorded
    before it is sent, and does not outlive the task. In a `@query_task` the use lasts until the
    returned queries have ended. If the worker shuts down, the next try takes over the cluster.

    Unlike `with ctx:`, it never hides an exception of the body, and does not fail if the cluster
    has already stopped.

    Parameters
    ----------
    cluster
        Manifest's `name`, and options of `polars_cloud.ComputeContext`: `cpus`, `memory`,
        `cluster_size`, `idle_timeout_mins`, ... The manifest is registered if need be. For a
        cluster of your own the scheduler's `uri` alone: it is neither started nor stopped.
    stop
        False: leave the cluster to its idle timeout.

    Yields
    ------
    polars_cloud.ComputeContext
        The default context of the body: `lf.remote()` uses it, too, except in another thread.

    Raises
    ------
    ClusterRefusedError
        `cluster` has no name, or an option that does not exist or is not supported.
    ValueError
        Polars Cloud refused the options.
    QueryNotAwaitedError
        The body ended without waiting for a query.
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
    """Register the manifest if it is absent, and anew if its options have changed.

    Parameters
    ----------
    cluster
        As `use_cluster` takes it.

    Raises
    ------
    ClusterRefusedError, ValueError
        As `use_cluster`.
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
    """Keep a cluster running while the tasks that are made inside the `with` block run.

    A cluster of your own is only used: no task is made, and `check` is not called.

    Makes a setup task `start_cluster` and a teardown task `stop_cluster`. The teardown begins when
    all tasks between them have ended, retries included. A failed task still fails the run.
    `stop_cluster` logs and returns the cost of the run's use of each cluster, as a list of dicts.
    What is not known is None, and `remark` says why.

    Parameters
    ----------
    cluster
        As `use_cluster` takes it; the tasks use the cluster with `use_cluster`.
    conn_id
        Id of the Airflow Connection.
    check
        Called by `start_cluster` before the start. Its exception fails the task.
    cost
        Asset of `stop_cluster`, whose events have what the task returns, as `cost`.

    Raises
    ------
    ClusterRefusedError
        While the DAG file is parsed: `cluster` has no name.
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

    # Not @teardown: its second use in one process fails with "Trigger rule not configurable".
    stop: Any = stop_cluster()
    with stop.as_teardown(setups=start) as between:
        before = set(dag.task_ids)
        yield
        for made in dag.tasks:
            if made.is_mapped and made.task_id not in before:
                between.add_task(made)  # expand() does not join the scope by itself


def start_for_run(cluster: Cluster, conn_id: str) -> None:
    """Start the cluster unless it is running, and keep it for the run."""
    with task_scope(conn_id) as scope:
        scope.begin()
        use = ClusterUse(scope.record.owner._replace(whole_run=True), conn_id, cluster["name"])
        ctx = _open_use(scope, use, cluster)
        start_and_wait(scope, ctx)
        scope.clusters.remove_use(use)  # last: a failed setup has no teardown
        logger.info("Cluster %s of manifest %s is running", get_cluster_id(ctx), use.manifest)


def stop_for_run(cluster: Cluster, conn_id: str, started_by: str) -> list[Cost]:
    """Stop the cluster, unless it has stopped by itself or others are using it.

    Queries on it whose tasks were killed are canceled first.

    Returns
    -------
    list
        What the run's use of each cluster cost.
    """
    with task_scope(conn_id) as scope:
        scope.begin()
        owner = scope.record.owner._replace(task_id=started_by, whole_run=True)
        use = ClusterUse(owner, conn_id, cluster["name"])
        if stored := get_use(use.key):
            use = stored
        else:
            logger.info("The cost is in the log of whoever ended this run's use of the cluster")
        left, costs = end_use(scope.session, use, waits_for_stop=True)
        log_failures(left)
        return costs or [
            describe_unknown(use, each, "its use could not be ended") for each in use.clusters
        ]


def start_and_wait(scope: TaskScope, ctx: ComputeContext) -> None:
    """Start the cluster unless it is running, and wait until it accepts queries.

    Raises
    ------
    ClusterNotStartedError
        The cluster did not start.
    """
    session = scope.session
    if was_available(ctx):
        return
    session.call(start_without_waiting, ctx)
    scope.clusters.add_cluster(ctx)
    cluster_id = get_cluster_id(ctx)
    assert cluster_id is not None, "it was started, or is running"
    began = time.monotonic()
    while (status := session.call(ctx.get_status)).name == "STARTING":
        scope.check_killed()  # signals do not reach a thread
        check_deadline(scope)
        defer_until_started(scope, cluster_id, after=time.monotonic() - began)
        time.sleep(START_POLL_SECONDS)
    if not status.is_available():
        _, reason = session.call(get_cluster_status, cluster_id, session.find_workspace())
        raise ClusterNotStartedError(f"Cluster {cluster_id} did not start: {reason or status.name}")


def check_cluster(cluster: Cluster) -> None:
    """Refuse a cluster that cannot be recorded."""
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
            f"A cluster has no option {', '.join(sorted(map(str, unknown)))}: the options are "
            f"{', '.join(sorted(OPTIONS))}"
        )
    if (mode := cluster.get("connection_mode")) not in (None, "direct", "proxy"):
        raise ClusterRefusedError(
            f'A cluster has no connection_mode {mode!r}: write "direct", which is the default, or '
            '"proxy"'
        )


def _check_own_cluster(cluster: Cluster) -> None:
    url = urlsplit(str(cluster["uri"]))
    if url.scheme not in ("http", "https") or not url.hostname or url.username:
        raise ClusterRefusedError(
            f"The uri of a cluster of your own is its scheduler's, such as "
            f'"https://polars.example.com:5051", and not {cluster["uri"]!r}'
        )
    if others := sorted(map(str, cluster.keys() - {"uri"})):
        raise ClusterRefusedError(
            f"A cluster of your own has no option {', '.join(others)}: leave out all but its uri, "
            "for it is neither started nor stopped; headers and ca_cert are in the extra of the "
            "Airflow Connection"
        )


def _open_use(scope: TaskScope, use: ClusterUse, cluster: Cluster) -> ComputeContext:
    """Record the use of a cluster, and return the context of its manifest."""
    scope.clusters.check_open(use.manifest)  # before the manifest changes
    scope.session.find_workspace()  # without it, no orphan could be ended
    is_used = functools.partial(has_other_users, scope.session, use)
    ctx = register_manifest(scope.session, cluster, is_used)
    cluster_id = get_cluster_id(ctx)
    if cluster_id:
        use.add_cluster(cluster_id, *get_size(ctx), has_started=False)
    scope.clusters.record_use(use)  # before the first query starts the cluster
    if cluster_id:
        is_used()  # cancels orphans: our query would wait behind them
    logger.info("Using cluster %s of manifest %s", cluster_id or "(to be started)", use.manifest)
    return ctx
