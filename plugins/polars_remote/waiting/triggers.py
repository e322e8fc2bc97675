"""Triggers that wait for queries or for a cluster.

The triggerer imports this module to run a trigger, and workers import it to defer a task. Imports
that only the triggerer needs are local.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from abc import abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from ..compat.versions import CALLS_ON_KILL


class PolarsCloudTrigger(BaseTrigger):
    """Poll Polars Cloud until the task can resume.

    Parameters
    ----------
    conn_id
        Id of the Airflow Connection.
    task_key
        Key of the task's entry in the record.
    not_before, resume_at
        Earliest and latest time to fire, in seconds since the epoch.
    deadline
        End of the task's `execution_timeout`, in seconds since the epoch; None without one. The
        trigger then cancels the task's queries.
    """

    def __init__(
        self,
        *,
        conn_id: str,
        task_key: str,
        not_before: float,
        resume_at: float,
        deadline: float | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conn_id = conn_id
        self.task_key = task_key
        self.not_before = not_before
        self.resume_at = resume_at
        self.deadline = deadline

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and its arguments. Airflow stores them; none is secret."""
        return f"{type(self).__module__}.{type(self).__qualname__}", {
            "conn_id": self.conn_id,
            "task_key": self.task_key,
            "not_before": self.not_before,
            "resume_at": self.resume_at,
            "deadline": self.deadline,
        }

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Fire once, with the results so far."""
        event: dict[str, Any] = {}
        try:
            # In a thread: importing Polars would block every other trigger.
            await asyncio.to_thread(importlib.import_module, ".in_triggerer", __package__)
            from .in_triggerer import watching_task

            with watching_task(self.task_key):
                async for poll in self.poll():
                    event, should_resume = poll
                    if should_resume or time.time() >= self.resume_at:
                        break
            if self.deadline is not None and time.time() >= self.deadline:
                await self.cancel()
            await asyncio.sleep(self.not_before - time.time())
        except asyncio.CancelledError:
            if not CALLS_ON_KILL:
                from .in_triggerer import end_if_ended

                await end_if_ended(self.task_key)
            raise
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def on_kill(self) -> None:
        """End the task's queries and cluster uses. Called if a user or a time-out ends the task."""
        from .in_triggerer import end_task

        await end_task(self.task_key)

    @abstractmethod
    def poll(self) -> AsyncIterator[tuple[dict[str, Any], bool]]:
        """Yield after each poll the event for the task so far, and whether to resume the task."""

    async def cancel(self) -> None:
        """Cancel the queries of a task that has timed out. The task ends its cluster uses."""


class QueryTrigger(PolarsCloudTrigger):
    """Wait until all queries of a task have succeeded, or one has not.

    Parameters
    ----------
    queries
        One dict per query. `destination` is the query's name in the record; `query_id`,
        `cluster_id` and `page` are texts; `submitted_at` is in seconds since the epoch.
    times
        Other parameters, as for `PolarsCloudTrigger`.
    """

    def __init__(self, *, queries: list[dict[str, Any]], **times: Any) -> None:
        super().__init__(**times)
        self.queries = queries

    def serialize(self) -> tuple[str, dict[str, Any]]:
        path, arguments = super().serialize()
        return path, arguments | {"queries": self.queries}

    def poll(self) -> AsyncIterator[tuple[dict[str, Any], bool]]:
        from .in_triggerer import watch_queries

        return watch_queries(self.conn_id, self.queries)

    async def cancel(self) -> None:
        from .in_triggerer import cancel_queries

        await cancel_queries(self.conn_id, self.queries)


class ClusterTrigger(PolarsCloudTrigger):
    """Wait until a cluster is running or has failed to start.

    Parameters
    ----------
    cluster_id
        Id of the cluster.
    times
        Other parameters, as for `PolarsCloudTrigger`.
    """

    def __init__(self, *, cluster_id: str, **times: Any) -> None:
        super().__init__(**times)
        self.cluster_id = cluster_id

    def serialize(self) -> tuple[str, dict[str, Any]]:
        path, arguments = super().serialize()
        return path, arguments | {"cluster_id": self.cluster_id}

    def poll(self) -> AsyncIterator[tuple[dict[str, Any], bool]]:
        from .in_triggerer import watch_cluster

        return watch_cluster(self.conn_id, self.cluster_id)
