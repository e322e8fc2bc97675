"""What waits for a query or a cluster in Airflow's triggerer.

The triggerer imports it from PYTHONPATH or plugins/.

Workers import it to defer a task: what only the triggerer needs is imported there.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from abc import abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent


class PolarsCloudTrigger(BaseTrigger):
    """Looks at Polars Cloud until there is news for the task; only looks, until the task is killed.

    Parameters
    ----------
    conn_id
        Id of the Airflow Connection.
    task_key
        Key of the ledger's entry about the task.
    fires_from, hand_back_at, deadline
        When the trigger may fire, when it does so without news, and when the task is out of time
        and its queries are canceled; in seconds since the epoch.
    """

    def __init__(
        self,
        *,
        conn_id: str,
        task_key: str,
        fires_from: float,
        hand_back_at: float,
        deadline: float | None,
        **what: Any,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conn_id = conn_id
        self.task_key = task_key
        self.fires_from = fires_from
        self.hand_back_at = hand_back_at
        self.deadline = deadline
        self.what = what

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and its arguments; Airflow stores them, and none is secret."""
        return f"{type(self).__module__}.{type(self).__qualname__}", {
            "conn_id": self.conn_id,
            "task_key": self.task_key,
            "fires_from": self.fires_from,
            "hand_back_at": self.hand_back_at,
            "deadline": self.deadline,
            **self.what,
        }

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Fire once: with all news, or with what there is of it, for the task to see for itself."""
        # In a thread, as Polars takes long enough to hold up every other trigger.
        await asyncio.to_thread(importlib.import_module, ".watching", __package__)
        from .watching import looking_after

        news: dict[str, Any] = {}
        with looking_after(self.task_key):
            async for look in self.look():
                news, is_over = look
                if is_over or time.time() >= self.hand_back_at:
                    break
        if self.deadline is not None and time.time() >= self.deadline:
            await self.cancel()
        await asyncio.sleep(self.fires_from - time.time())
        yield TriggerEvent(news)  # type: ignore[no-untyped-call]

    async def on_kill(self) -> None:
        """End what the task has started: a user has marked or cleared it, or its run is over."""
        from .watching import end_task

        await end_task(self.conn_id, self.task_key)

    @abstractmethod
    def look(self) -> AsyncIterator[tuple[dict[str, Any], bool]]:
        """Yield again and again what there is to tell the task, and whether it is to be told."""

    async def cancel(self) -> None:
        """End what the task must not wait for any longer; the task itself does the rest."""


class QueryTrigger(PolarsCloudTrigger):
    """Waits until each of a task's queries has succeeded, or one has not."""

    def look(self) -> AsyncIterator[tuple[dict[str, Any], bool]]:
        from .watching import watch_queries

        return watch_queries(self.conn_id, self.what["queries"])

    async def cancel(self) -> None:
        from .watching import cancel_queries

        await cancel_queries(self.conn_id, self.what["queries"])


class ClusterTrigger(PolarsCloudTrigger):
    """Waits until a cluster is running, or has failed to start."""

    def look(self) -> AsyncIterator[tuple[dict[str, Any], bool]]:
        from .watching import watch_cluster

        return watch_cluster(self.conn_id, self.what["cluster_id"])
