"""Keep a cluster for a part of a DAG: a setup task starts it, a teardown task stops it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from airflow.sdk import task

from . import ledger
from .client_internals import get_cluster_id
from .clusters import check_name, record_use, start_and_wait
from .ledger import Owner
from .manifests import Cluster, ensure_manifest
from .query_tasks import query_task
from .recorded_queries import end_recorded_query
from .releases import release
from .task_scope import logged_in

logger = logging.getLogger(__name__)


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
    check_name(cluster)
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


@query_task(execution_timeout=timedelta(minutes=15))
def start_cluster(cluster: dict[str, Any], conn_id: str) -> None:
    """Start the cluster unless it is running, and keep it for the run."""
    with logged_in(conn_id) as scope:
        owner = scope.owner._replace(whole_run=True)
        name = cluster["name"]
        key = record_use(name, owner)  # a setup that fails is never torn down
        ctx = ensure_manifest(cluster, owner)
        start_and_wait(ctx)
        scope.kept.discard(key)
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
