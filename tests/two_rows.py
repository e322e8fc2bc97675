"""A query that writes two rows, and tries that are killed or deferred while it runs."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import TaskDeferred

from polars_cloud_emulator.testing import RunningEmulator
from polars_remote import use_cluster
from polars_remote.ownership.record import Wait
from polars_remote.ownership.scope import current_scope
from polars_remote.waiting.deferral import defer_until_ended
from polars_remote.waiting.triggers import PolarsCloudTrigger, QueryTrigger
from tests.tries import StartTry, Supervisor

FILE = "s3://your-bucket/results/one.parquet"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})
SECONDS = 60.0
"""Seconds after which a trigger fails the test."""


def submit(ctx: Any, uri: str = FILE, frame: pl.LazyFrame = TWO_ROWS) -> Any:
    return frame.remote(ctx).single_node().sink_parquet(uri)


def submit_and_freeze(cluster: Mapping[str, Any]) -> Iterator[None]:
    with use_cluster(cluster) as ctx:
        submit(ctx)
        yield


def defer(
    emulator: RunningEmulator,
    cluster: Mapping[str, Any],
    supervisor: Supervisor,
    start_try: StartTry,
) -> QueryTrigger:
    """Defer a task whose query takes a minute, and return its trigger."""
    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    with pytest.raises(TaskDeferred) as deferred, start_try():  # noqa: PT012
        scope = current_scope()
        scope.task.defers = True
        with use_cluster(cluster) as ctx:
            submit(ctx)
        defer_until_ended(scope, [FILE], Wait(since=time.time()))
    supervisor.states["manual__1"]["run_query"] = "deferred"
    trigger = deferred.value.trigger
    assert isinstance(trigger, QueryTrigger)
    return trigger


def first_event(trigger: PolarsCloudTrigger) -> Any:
    """Return the trigger's first event."""

    async def fire() -> Any:
        return (await anext(aiter(trigger.run()))).payload

    return asyncio.run(asyncio.wait_for(fire(), SECONDS))
