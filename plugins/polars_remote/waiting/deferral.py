"""Defer a waiting task: free its worker slot, and wait in the triggerer instead."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..compat.versions import AirflowTaskTimeout, TaskDeferred
from ..ownership.record import Wait

if TYPE_CHECKING:
    from ..ownership.scope import TaskScope
    from .triggers import PolarsCloudTrigger

logger = logging.getLogger(__name__)

IN_WORKER_SECONDS = 3.0
"""Seconds for which the worker waits before it defers. Shorter queries need no deferral."""

SHORTEST_RESUME_DELAY, LONGEST_RESUME_DELAY = 6.0, 12.0
"""Limits, in seconds, of the delay before a trigger may fire; within them, as long as the task took
to start. If a trigger fires before the scheduler has seen the worker exit, Airflow treats the task
as killed (apache/airflow #67287, #71580)."""

SHORTEST_TRIGGER_TIMEOUT, LONGEST_TRIGGER_TIMEOUT = 300.0, 1800.0
"""Limits, in seconds, of the trigger time-out; within them, as long as the task has waited so far.
The trigger then resumes the task in any case. Without a triggerer, Airflow does so a little later.
"""

TIMEOUT_MARGIN_SECONDS = 60.0
"""Seconds by which Airflow's time-out for the deferral is later than the trigger's own."""


def defer_until_started(scope: TaskScope, cluster_id: str, *, after: float) -> None:
    """Defer a `@query_task` until the cluster is running; its function is then called again.

    Does nothing if the task cannot be deferred, or has waited for less than `IN_WORKER_SECONDS`.

    Parameters
    ----------
    after
        Seconds for which the task has waited so far.
    """
    if not scope.can_return_queries:
        return
    check_deadline(scope)
    if scope.task.defers and after >= IN_WORKER_SECONDS:
        logger.info("Deferred until cluster %s is running; no worker slot is held", cluster_id)
        from .triggers import ClusterTrigger  # here, to keep parsing DAG files fast

        earlier = scope.record.waits_for
        waits_for = Wait(since=earlier.since if earlier else time.time(), cluster=cluster_id)
        times = _get_times(scope, waits_for)
        _defer(scope, waits_for, ClusterTrigger(cluster_id=cluster_id, **times))


def defer_until_ended(scope: TaskScope, names: Iterable[str], waits_for: Wait) -> None:
    """Defer the task until its queries with these names have ended."""
    from .triggers import QueryTrigger  # here, to keep parsing DAG files fast

    records = scope.record.queries
    queries = [
        {
            "destination": name,
            "query_id": records[name].query_id,
            "cluster_id": records[name].cluster_id,
            "page": records[name].page,
            "submitted_at": records[name].submitted_at,
        }
        for name in names
    ]
    logger.info(
        "Deferred until %s ends; no worker slot is held",
        ", ".join(f"query {each['query_id']}" for each in queries),
    )
    _defer(scope, waits_for, QueryTrigger(queries=queries, **_get_times(scope, waits_for)))


def check_deadline(scope: TaskScope) -> None:
    """Enforce the task's `execution_timeout`, whose clock Airflow restarts after each deferral.

    Raises
    ------
    AirflowTaskTimeout
        The task has exceeded its `execution_timeout`.
    """
    if scope.record.deadline is not None and time.time() >= scope.record.deadline:
        raise AirflowTaskTimeout(
            f"Process timed out: the task exceeded its execution_timeout of "
            f"{scope.task.execution_timeout}"
        )


def _get_times(scope: TaskScope, waits_for: Wait) -> dict[str, Any]:
    now = time.time()
    start_up = waits_for.since - scope.started_at
    delay = min(max(start_up, SHORTEST_RESUME_DELAY), LONGEST_RESUME_DELAY)
    waited = now - waits_for.since
    resume_at = now + min(max(waited, SHORTEST_TRIGGER_TIMEOUT), LONGEST_TRIGGER_TIMEOUT)
    if scope.record.deadline is not None:
        resume_at = min(resume_at, scope.record.deadline)
    return {
        "conn_id": scope.record.conn_id,
        "task_key": scope.entry.key,
        "not_before": now + delay,
        "resume_at": resume_at,
        "deadline": scope.record.deadline,
    }


def _defer(scope: TaskScope, waits_for: Wait, trigger: PolarsCloudTrigger) -> None:
    seconds = trigger.resume_at - time.time() + TIMEOUT_MARGIN_SECONDS
    deferral = TaskDeferred(
        trigger=trigger,
        method_name="resume",
        # A copy, in case the record is deleted. If the trigger fails, Airflow replaces these
        # arguments. As JSON text, because Airflow refuses to serialize a serialized value again.
        kwargs={"waits_for": json.dumps(waits_for.dump()), "conn_id": scope.record.conn_id},
        timeout=timedelta(seconds=seconds),
    )
    scope.defer(waits_for, deferral)
