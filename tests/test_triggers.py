"""`triggers.py` and `watching.py`: what waits in the triggerer, for many tasks in one process."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from airflow.triggers.base import TriggerEvent

from include.polars_remote import deferral, watching
from include.polars_remote.client_internals import get_cluster_id, start_without_waiting
from include.polars_remote.clusters import use_cluster
from include.polars_remote.deferral import defer_until_ended
from include.polars_remote.login import EMULATOR
from include.polars_remote.manifests import ensure_manifest
from include.polars_remote.queries import submit
from include.polars_remote.task_scope import current_scope
from include.polars_remote.triggers import ClusterTrigger, PolarsCloudTrigger
from polars_cloud_emulator.testing import RunningEmulator, eventually
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, kill

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4, "cluster_size": 2}
FILES = ["s3://your-bucket/results/one.parquet", "s3://your-bucket/results/two.parquet"]
MINUTE = timedelta(minutes=1)

Defer = Callable[..., PolarsCloudTrigger]


@pytest.fixture(autouse=True)
def at_once(pc: ModuleType, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Triggers fire as soon as there is news; the log tells what it tells in Airflow."""
    monkeypatch.setattr(deferral, "LONGEST_RACE", 0.0)
    caplog.set_level("INFO", "include")


@pytest.fixture
def defer(emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor) -> Defer:
    """Make a task with two queries, each of a minute unless told otherwise, and defer it."""

    def defer(fault: str = "query_takes", try_number: int = 1, **fields: Any) -> PolarsCloudTrigger:
        fields = fields or ({"seconds": 60} if fault == "query_takes" else {})
        emulator.add_fault("SubmitQuery", fault, times=2, **fields)
        with pytest.raises(TaskDeferred) as deferred, start_try(try_number):  # noqa: PT012
            scope = current_scope()
            scope.task.defers = True
            with use_cluster(CLUSTER) as ctx:
                remote = pl.LazyFrame({"x": [1, 2]}).remote(ctx).single_node()
                for file in FILES:
                    submit(remote.sink_parquet, file)
            defer_until_ended(scope, FILES, {"since": time.time()})
        supervisor.states["manual__1"]["run_query"] = "deferred"
        return sent_to_triggerer(deferred.value.trigger)

    return defer


def sent_to_triggerer(trigger: PolarsCloudTrigger) -> PolarsCloudTrigger:
    """The trigger as the triggerer makes it."""
    path, arguments = trigger.serialize()
    assert path == f"{type(trigger).__module__}.{type(trigger).__name__}"
    return type(trigger)(**arguments)


def first_event(trigger: PolarsCloudTrigger) -> Any:
    """What the trigger fires first."""

    async def fire() -> TriggerEvent:
        async for event in trigger.run():
            return event
        raise AssertionError("the trigger has not fired")

    return asyncio.run(asyncio.wait_for(fire(), 60)).payload


@contextlib.contextmanager
def running(trigger: PolarsCloudTrigger) -> Iterator[list[Any]]:
    """Run the trigger in a thread; what it has fired."""
    fired: list[Any] = []
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(lambda: fired.append(first_event(trigger)))
        yield fired
        done.result()


# What it fires


def test_a_trigger_fires_with_what_the_queries_have_written(
    defer: Defer, emulator: RunningEmulator
) -> None:
    with running(defer()) as fired:
        eventually(lambda: calls(emulator, "GetQueryStatus") > 2)
        assert fired == []
        emulator.advance_clock(MINUTE)
    assert fired == [{"results": {file: {"location": [file], "rows": 2} for file in FILES}}]


def test_a_trigger_fires_with_nothing_when_a_query_fails_while_another_one_runs(
    defer: Defer, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: no such type")
    trigger = defer("query_hangs")
    assert first_event(trigger) == {"results": {}}
    assert query_statuses(emulator) == ["Failed", "InProgress"]


def test_a_trigger_fires_with_nothing_when_a_query_was_canceled(
    defer: Defer, emulator: RunningEmulator
) -> None:
    trigger = defer("query_hangs")
    query_id = emulator.state()["queries"][0]["id"]
    emulator.call("POST", f"query/{query_id}/cancel")
    assert first_event(trigger) == {"results": {}}


def test_a_trigger_fires_with_nothing_when_its_cluster_has_stopped(
    defer: Defer, emulator: RunningEmulator, pc: ModuleType
) -> None:
    trigger = defer("query_hangs")
    pc.ComputeContext(workspace="playground", name="shop").stop()
    assert first_event(trigger) == {"results": {}}


def test_a_trigger_that_cannot_log_in_fails_so_that_its_task_waits_in_its_worker(
    defer: Defer,
) -> None:
    trigger = defer("query_hangs")
    trigger.conn_id = "nowhere"
    with pytest.raises(AirflowFailException, match="'nowhere' is missing"):
        first_event(trigger)


def test_a_trigger_does_not_fire_before_the_worker_can_have_reported_its_deferral(
    defer: Defer, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferral, "LONGEST_RACE", 2.0)
    trigger = defer()
    emulator.advance_clock(MINUTE)
    assert "results" in first_event(trigger)
    assert time.time() >= trigger.fires_from


def test_a_trigger_hands_back_a_wait_that_lasts(defer: Defer, emulator: RunningEmulator) -> None:
    trigger = defer("query_hangs")
    trigger.hand_back_at = time.time()
    assert first_event(trigger) == {"results": {}}
    assert query_statuses(emulator) == ["InProgress", "InProgress"]


def test_a_trigger_cancels_the_queries_of_a_task_that_is_out_of_time(
    defer: Defer, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    trigger = defer("query_hangs")
    trigger.hand_back_at = trigger.deadline = time.time()
    assert first_event(trigger) == {"results": {}}
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    # The task does the rest.
    assert cluster_statuses(emulator) == ["Idle"]
    assert entries(supervisor, "task")


def test_a_trigger_row_holds_no_secret(defer: Defer, emulator: RunningEmulator) -> None:
    _, arguments = defer("query_hangs").serialize()
    assert emulator.environment["POLARS_CLOUD_CLIENT_SECRET"] not in str(arguments)
    assert "earer" not in str(arguments)


# Accounts


def test_queries_of_two_accounts_are_looked_at_with_the_login_of_their_own(
    defer: Defer, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_id, secret = emulator.add_service_account("second")
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", f"http://{client_id}:{secret}@")
    first = defer("query_hangs")
    second = sent_to_triggerer(first)
    second.conn_id = "second"

    async def run() -> None:
        runs = [asyncio.ensure_future(anext(aiter(each.run()))) for each in (first, second)]
        for account in (client_id, EMULATOR):
            while looks_of(emulator, account) < 10:
                await asyncio.sleep(0.05)
        for each in runs:
            each.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 60))


def looks_of(emulator: RunningEmulator, account: str) -> int:
    return sum(
        call["account"] == account and call["path"].endswith("GetQueryStatus")
        for call in emulator.journal()
    )


# Outages


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "grpc_error", "code": "UNAVAILABLE", "message": "down"},
        {"kind": "grpc_error", "code": "INTERNAL", "message": "down"},
        {"kind": "connection_reset"},
        {"kind": "tokens_expire"},
    ],
    ids=lambda fault: fault.get("code", fault["kind"]),
)
def test_an_outage_is_ridden_out(
    defer: Defer, emulator: RunningEmulator, fault: dict[str, Any]
) -> None:
    trigger = defer()
    emulator.add_fault("GetQueryStatus", times=3, **fault)
    emulator.advance_clock(MINUTE)
    assert set(first_event(trigger)["results"]) == set(FILES)
    assert emulator.state()["faults"] == []


def test_an_outage_that_lasts_too_long_hands_back(
    defer: Defer, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "OUTAGE_SECONDS", 1.0)
    trigger = defer("query_hangs")
    emulator.add_fault(
        "GetQueryStatus", "grpc_error", times=1000, code="UNAVAILABLE", message="down"
    )
    assert first_event(trigger) == {"results": {}}
    emulator.clear_faults()
    assert query_statuses(emulator) == ["InProgress", "InProgress"]


def test_a_call_without_a_reply_holds_up_nothing_and_is_given_up(
    defer: Defer, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "CALL_SECONDS", 2.0)
    trigger = defer()
    emulator.add_fault("GetQueryStatus", "stall", times=2)
    emulator.advance_clock(MINUTE)

    async def run() -> tuple[Any, float]:
        longest, before = 0.0, time.monotonic()
        firing = asyncio.ensure_future(anext(aiter(trigger.run())))
        while not firing.done():
            await asyncio.sleep(0.01)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        return (await firing).payload, longest

    event, longest = asyncio.run(asyncio.wait_for(run(), 60))
    assert set(event["results"]) == set(FILES)
    assert longest < watching.CALL_SECONDS, "the event loop was held up"


# The end of the task


def kill_deferred(trigger: PolarsCloudTrigger) -> None:
    asyncio.run(trigger.on_kill())


def test_what_a_deferred_task_has_started_ends_when_a_user_ends_the_task(
    defer: Defer, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    kill_deferred(defer("query_hangs"))
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_deferred_task_that_was_cleared_is_left_to_the_next_try(
    defer: Defer, emulator: RunningEmulator
) -> None:
    trigger = defer("query_hangs")

    def take_over() -> Iterator[None]:
        yield

    kill(take_over, 2)
    kill_deferred(trigger)
    assert query_statuses(emulator) == ["InProgress", "InProgress"]
    assert cluster_statuses(emulator) == ["Running"]


def test_a_triggerer_that_stops_cancels_nothing(
    defer: Defer, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    trigger = defer("query_hangs")

    async def stop() -> None:
        run = asyncio.ensure_future(anext(aiter(trigger.run())))
        while calls(emulator, "GetQueryStatus") < 2:
            await asyncio.sleep(0.05)
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        await trigger.cleanup()

    asyncio.run(asyncio.wait_for(stop(), 60))
    assert query_statuses(emulator) == ["InProgress", "InProgress"]
    assert entries(supervisor, "task")


# Clusters


def starting(emulator: RunningEmulator, **fault: Any) -> ClusterTrigger:
    emulator.add_fault("POST manifest/start", **fault)
    ctx = ensure_manifest(CLUSTER)
    start_without_waiting(ctx)
    cluster_id = get_cluster_id(ctx)
    assert cluster_id is not None
    now = time.time()
    return ClusterTrigger(
        cluster_id=cluster_id,
        conn_id="polars_cloud",
        task_key="polars_cloud/task/1",
        fires_from=now,
        hand_back_at=now + 60,
        deadline=None,
    )


@pytest.mark.usefixtures("supervisor")
def test_a_trigger_fires_with_nothing_to_tell_when_the_cluster_is_running(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "CLUSTER_PAUSE_SECONDS", 0.1)
    with running(starting(emulator, kind="startup_takes", seconds=60)) as fired:
        seen = calls(emulator, emulator.state()["clusters"][0]["id"])
        eventually(lambda: calls(emulator, emulator.state()["clusters"][0]["id"]) > seen + 2)
        assert fired == []
        emulator.advance_clock(MINUTE)
    assert fired == [{}]


@pytest.mark.usefixtures("supervisor")
def test_a_trigger_tells_why_the_cluster_has_not_started(emulator: RunningEmulator) -> None:
    trigger = starting(emulator, kind="startup_fails", message="no machines left")
    assert first_event(trigger) == {"failed": "no machines left"}
