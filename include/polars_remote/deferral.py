"""Give a worker slot back while a task waits: the triggerer takes up the wait."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .airflow_versions import AirflowTaskTimeout, TaskDeferred
from .task_scope import find_scope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .ledger import Value
    from .task_scope import TaskScope
    from .triggers import PolarsCloudTrigger

logger = logging.getLogger(__name__)

IN_WORKER_SECONDS = 3.0
"""To wait in the worker before a task is deferred: what ends sooner needs no second start."""

SHORTEST_RACE, LONGEST_RACE = 6.0, 12.0
"""Seconds until a trigger may fire: Airflow mistakes a task that is resumed before its worker has
exited, and the scheduler has noticed it, for one that was killed (apache/airflow #67287, #71580).
In between, as long as the task took from its start until it waited: a machine that is slow at the
one is slow at the other."""

SHORTEST_ROUND, LONGEST_ROUND = 300.0, 1800.0
"""Seconds after which a trigger hands the wait back, for as long as the task has waited so far.
Where no trigger does, since no triggerer is alive, Airflow resumes the task a little later."""

MARGIN_SECONDS = 60.0
"""For a trigger to hand back by itself before Airflow resumes the task without it."""


def defer_until_started(cluster_id: str, *, after: float) -> None:
    """Defer the current task, if it can be, until the cluster is running; it then runs anew.

    Parameters
    ----------
    after
        Seconds for which the task has waited already.
    """
    scope = find_scope()
    if scope is None or not scope.returns_queries:
        return
    check_deadline(scope)
    if scope.task.defers and after >= IN_WORKER_SECONDS:
        logger.info("Cluster %s is starting: the task waits without a worker slot", cluster_id)
        from .triggers import ClusterTrigger  # not when each DAG file is parsed

        waits_for = {"cluster": cluster_id, "since": scope.waits_for.get("since", time.time())}
        times = _get_times(scope, waits_for)
        _defer(scope, waits_for, ClusterTrigger(cluster_id=cluster_id, **times))


def defer_until_ended(scope: TaskScope, destinations: Iterable[str], waits_for: Value) -> None:
    """Defer the current task until its queries for these destinations have ended."""
    from .triggers import QueryTrigger  # not when each DAG file is parsed

    queries = [
        {
            "destination": destination,
            **{
                name: scope.queries[destination][name]
                for name in ("query_id", "cluster_id", "page", "submitted_at")
            },
        }
        for destination in destinations
    ]
    _defer(scope, waits_for, QueryTrigger(queries=queries, **_get_times(scope, waits_for)))


def check_deadline(scope: TaskScope) -> None:
    """Keep the task's `execution_timeout`, which Airflow counts anew after each deferral.

    Raises
    ------
    AirflowTaskTimeout
        It is over.
    """
    if scope.deadline is not None and time.time() >= scope.deadline:
        raise AirflowTaskTimeout(f"Process timed out: {scope.task.execution_timeout} are over")


def _get_times(scope: TaskScope, waits_for: Value) -> dict[str, Any]:
    now = time.time()
    since = waits_for["since"]
    race = min(max(since - scope.started_at, SHORTEST_RACE), LONGEST_RACE)
    waited = now - since
    hand_back_at = now + min(max(waited, SHORTEST_ROUND), LONGEST_ROUND)
    if scope.deadline is not None:
        hand_back_at = min(hand_back_at, scope.deadline)
    return {
        "conn_id": scope.conn_id,
        "task_key": scope.key,
        "fires_from": now + race,
        "hand_back_at": hand_back_at,
        "deadline": scope.deadline,
    }


def _defer(scope: TaskScope, waits_for: Value, trigger: PolarsCloudTrigger) -> None:
    seconds = trigger.hand_back_at - time.time() + MARGIN_SECONDS
    deferral = TaskDeferred(
        trigger=trigger, method_name="resume", timeout=timedelta(seconds=seconds)
    )
    scope.defer(waits_for, deferral)
