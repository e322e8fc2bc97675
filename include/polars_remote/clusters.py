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
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import task

from . import ledger
from .client_internals import get_cluster_id, misspecified_error
from .ledger import Owner
from .login import call_polars_cloud
from .manifests import Cluster, ensure_manifest, find_manifest
from .outages import time_left
from .recorded_queries import end_recorded_query
from .task_scope import current_scope, grace, log_errors, logged_in

if TYPE_CHECKING:
    from polars_cloud import ComputeContext

logger = logging.getLogger(__name__)

WIND_UP_SECONDS = 10.0
"""For a cluster to become idle after its last query has ended."""

STARTING_PAUSE_SECONDS = 1.0
"""Between two looks at a cluster that somebody else is starting."""


def compute_context(cluster: Cluster) -> ComputeContext:
    """Return the context of a running cluster that nobody stops: its idle timeout does.

    The cluster is started unless it is running.

    Parameters
    ----------
    cluster
        As `use_cluster` takes it.
    """
    _check_name(cluster)
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
    RuntimeError
        The cluster did not start.
    """
    call_polars_cloud(ctx.start, call_timeout=None)
    # The client waits for a cluster that it has started itself, and for no other.
    while (status := call_polars_cloud(ctx.get_status)).name == "STARTING":
        time.sleep(STARTING_PAUSE_SECONDS)
    if not status.is_available():
        raise RuntimeError(f"Cluster {get_cluster_id(ctx)} did not start: it is {status.name}")


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
    _check_name(cluster)
    scope = current_scope()
    scope.claim_task()
    name = cluster["name"]
    scope.clusters[name] += 1
    ledger.put(
        ledger.cluster_key(name, scope.owner),
        scope.owner,
        {"manifest": name, "conn_id": scope.conn_id},
    )

    def end() -> None:
        scope.clusters[name] -= 1
        if not scope.clusters[name] and scope.is_owner():
            release(name, scope.owner)

    cluster_id = None
    try:
        ctx = compute_context(cluster)
        cluster_id = get_cluster_id(ctx)
        logger.info("Using cluster %s of manifest %s", cluster_id, name)
        yield ctx
        scope.check_that_all_were_awaited(cluster_id)
    except BaseException as error:
        if scope.is_over(error):
            with grace(error), log_errors():
                if cluster_id and scope.is_owner():
                    scope.end_queries(cluster_id)
                end()
        raise
    end()


@contextmanager
def shared_cluster(cluster: Cluster, *, conn_id: str = "polars_cloud") -> Iterator[None]:
    """Keep a cluster running while the tasks that are made inside the `with` block run.

    Makes a setup task `start_cluster` and a teardown task `stop_cluster`. The teardown begins when
    each task between them has ended, retries included, and a task that failed still fails the run.

    Parameters
    ----------
    cluster
        As `use_cluster` takes it; the tasks use the cluster with `use_cluster`.
    conn_id
        Id of the Airflow Connection.

    Raises
    ------
    ValueError
        While the DAG file is parsed: `cluster` has no name.
    """
    _check_name(cluster)
    start: Any = start_cluster(dict(cluster), conn_id)
    # Not @teardown, of which a second use in one process fails: "Trigger rule not configurable".
    stop: Any = stop_cluster(cluster["name"], start.operator.task_id, conn_id)
    dag = start.operator.dag
    with stop.as_teardown(setups=start) as scope:
        before = set(dag.task_ids)
        yield
        for made in dag.tasks:
            if made.is_mapped and made.task_id not in before:
                scope.add_task(made)  # expand() does not join the scope by itself


@task(execution_timeout=timedelta(minutes=15))
def start_cluster(cluster: dict[str, Any], conn_id: str) -> None:
    """Start the cluster unless it is running, and keep it for the run."""
    with logged_in(conn_id) as scope:
        owner = scope.owner._replace(whole_run=True)
        name = cluster["name"]
        ledger.put(ledger.cluster_key(name, owner), owner, {"manifest": name, "conn_id": conn_id})
        try:
            ctx = ensure_manifest(cluster, owner)
            start_and_wait(ctx)
        except BaseException as error:
            if scope.is_over(error):
                with grace(error), log_errors():
                    release(name, owner)  # a setup that fails is never torn down
            raise
        logger.info("Cluster %s of manifest %s is running", get_cluster_id(ctx), name)


@task(execution_timeout=timedelta(minutes=5))
def stop_cluster(manifest: str, started_by: str, conn_id: str) -> None:
    """Stop the cluster, unless it has stopped by itself or others are using it.

    Queries of this run on it that have outlived their tasks are canceled first.
    """
    with logged_in(conn_id) as scope:
        owner = scope.owner._replace(task_id=started_by, whole_run=True)
        _end_orphans(manifest, owner)
        release(manifest, owner)


def release(manifest: str, owner: Owner) -> None:
    """End an owner's use of the manifest's cluster; stop it if that was the last.

    Of two who release it at the same time, each looks again when it is off the record: one of them
    is the last.
    """
    key = ledger.cluster_key(manifest, owner)
    if was_last := not ledger.has_other_users(manifest, owner):
        _stop(manifest)
    ledger.erase(key)
    if not was_last:
        if ledger.has_other_users(manifest, owner):
            logger.info("Cluster of manifest %s is left running for its other users", manifest)
        else:
            _stop(manifest)


def _end_orphans(manifest: str, owner: Owner) -> None:
    """End the run's queries on the cluster whose tasks were killed, and could not do it."""
    for key, task_owner, value in ledger.task_entries(owner.dag_id, owner.run_id):
        if task_owner.goes_on():
            continue
        ends = [
            record["manifest"] == manifest and end_recorded_query(destination, record)
            for destination, record in value["queries"].items()
        ]
        if all(ends):
            ledger.erase(key)


def _stop(manifest: str) -> None:
    """Stop the cluster unless somebody's query runs on it."""
    try:
        ctx = find_manifest(manifest)
    except misspecified_error() as error:
        logger.info("Manifest %s was registered anew, nothing to stop: %s", manifest, error)
        return
    if ctx is None:
        logger.info("Manifest %s does not exist: nothing to stop", manifest)
        return
    deadline = time.monotonic() + time_left(WIND_UP_SECONDS)
    while (status := call_polars_cloud(ctx.get_status)).name == "RUNNING":
        if time.monotonic() > deadline:
            logger.info(
                "Cluster %s is left running: somebody else's query runs on it",
                get_cluster_id(ctx),
            )
            return
        time.sleep(0.2)
    if status.is_available():
        call_polars_cloud(ctx.stop)
        logger.info("Cluster %s stopped", get_cluster_id(ctx))
    else:
        logger.info("Cluster of manifest %s is not running: nothing to stop", manifest)


def _check_name(cluster: Cluster) -> None:
    if not isinstance(cluster, Mapping) or not cluster.get("name"):
        raise ValueError(
            f"A cluster needs a name, by which it is found again after its worker was killed: "
            f'write {{"name": "airflow-reports", ...}} instead of {cluster!r}'
        )
