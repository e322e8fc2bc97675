"""`waiting/triggers.py`, `waiting/in_triggerer.py`: many tasks wait in one process."""

import asyncio
import contextlib
import importlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import TaskDeferred
from airflow.sdk.execution_time import comms

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import use_cluster
from polars_remote.cloud.client import get_cluster_id, start_without_waiting
from polars_remote.cloud.manifests import register_manifest
from polars_remote.cloud.session import EMULATOR, CloudSession
from polars_remote.errors import LoginRefusedError
from polars_remote.ownership import record
from polars_remote.ownership.end import EndFailure, end_orphans
from polars_remote.ownership.record import Owner, Wait
from polars_remote.ownership.scope import current_scope
from polars_remote.waiting import deferral, in_triggerer, triggers
from polars_remote.waiting.deferral import defer_until_ended
from polars_remote.waiting.in_triggerer import watching_task
from polars_remote.waiting.triggers import ClusterTrigger, PolarsCloudTrigger
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, kill
from tests.two_rows import SECONDS, first_event

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4, "cluster_size": 2}
FILES = ["s3://your-bucket/results/one.parquet", "s3://your-bucket/results/two.parquet"]
MINUTE = timedelta(minutes=1)

Defer = Callable[..., PolarsCloudTrigger]


@pytest.fixture(autouse=True)
def fire_at_once(pc: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let triggers fire without delay."""
    monkeypatch.setattr(deferral, "LONGEST_RESUME_DELAY", 0.0)


@pytest.fixture
def defer(emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor) -> Defer:
    """Defer a task with two queries, each of a minute by default."""

    def defer(fault: str = "query_takes", try_number: int = 1, **fields: Any) -> PolarsCloudTrigger:
        fields = fields or ({"seconds": 60} if fault == "query_takes" else {})
        emulator.add_fault("SubmitQuery", fault, times=2, **fields)
        with pytest.raises(TaskDeferred) as deferred, start_try(try_number):  # noqa: PT012
            scope = current_scope()
            scope.task.defers = True
            with use_cluster(CLUSTER) as ctx:
                remote: Any = pl.LazyFrame({"x": [1, 2]}).remote(ctx).single_node()
                for file in FILES:
                    remote.sink_parquet(file)
            defer_until_ended(scope, FILES, Wait(since=time.time()))
        supervisor.states["manual__1"]["run_query"] = "deferred"
        return sent_to_triggerer(deferred.value.trigger)

    return defer


def import_class(path: str) -> type[PolarsCloudTrigger]:
    """Import a trigger by the path that Airflow has stored, as the triggerer does."""
    module, _, name = path.rpartition(".")
    found: type[PolarsCloudTrigger] = getattr(importlib.import_module(module), name)
    return found


def sent_to_triggerer(trigger: PolarsCloudTrigger) -> PolarsCloudTrigger:
    """Return the trigger as the triggerer creates it from Airflow's database."""
    path, arguments = trigger.serialize()
    made = import_class(path)(**json.loads(json.dumps(arguments)))
    assert type(made) is type(trigger)
    return made


@contextlib.contextmanager
def running(trigger: PolarsCloudTrigger) -> Iterator[list[Any]]:
    """Run the trigger in a thread, and yield its events."""
    fired: list[Any] = []
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(lambda: fired.append(first_event(trigger)))
        yield fired
        done.result()


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition without blocking the event loop."""
    while not condition():
        await asyncio.sleep(0.02)


def in_loop(act: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine in an event loop, as the triggerer does."""
    asyncio.run(asyncio.wait_for(act(), SECONDS))


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
    with pytest.raises(LoginRefusedError, match="'nowhere' is missing"):
        first_event(trigger)


def test_a_trigger_does_not_fire_before_the_worker_can_have_reported_its_deferral(
    defer: Defer, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferral, "LONGEST_RESUME_DELAY", 2.0)
    trigger = defer()
    emulator.advance_clock(MINUTE)
    assert "results" in first_event(trigger)
    assert time.time() >= trigger.not_before


def test_a_trigger_resumes_a_task_that_has_waited_for_long(
    defer: Defer, emulator: RunningEmulator
) -> None:
    trigger = defer("query_hangs")
    trigger.resume_at = time.time()
    assert first_event(trigger) == {"results": {}}
    assert query_statuses(emulator) == ["InProgress", "InProgress"]


def test_a_trigger_cancels_the_queries_of_a_task_that_is_out_of_time(
    defer: Defer, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    trigger = defer("query_hangs")
    trigger.resume_at = trigger.deadline = time.time()
    assert first_event(trigger) == {"results": {}}
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    # The resumed task does the rest.
    assert cluster_statuses(emulator) == ["Idle"]
    assert entries(supervisor, "task")


def test_a_query_that_cannot_be_canceled_by_the_trigger_is_left_to_the_task(
    defer: Defer, emulator: RunningEmulator, pc: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    trigger = defer("query_hangs")
    trigger.resume_at = trigger.deadline = time.time()
    pc.ComputeContext(workspace="playground", name="shop").stop()
    assert first_event(trigger) == {"results": {}}
    for query in emulator.state()["queries"]:
        sentence = f"Could not cancel query {query['id']} here; its task will, when it resumes: "
        assert sentence in caplog.text


def test_a_trigger_survives_a_restart_of_the_triggerer_with_all_its_fields(defer: Defer) -> None:
    trigger = defer("query_hangs")
    trigger.deadline = trigger.resume_at + 1
    assert sent_to_triggerer(trigger).serialize() == trigger.serialize()


def test_a_trigger_row_holds_no_secret(defer: Defer, emulator: RunningEmulator) -> None:
    _, arguments = defer("query_hangs").serialize()
    assert emulator.environment["POLARS_CLOUD_CLIENT_SECRET"] not in str(arguments)
    assert "earer" not in str(arguments)


# Accounts


def test_queries_of_two_accounts_are_polled_with_the_login_of_their_own(
    defer: Defer, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_id, secret = emulator.add_service_account("second")
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", f"http://{client_id}:{secret}@")
    first = defer("query_hangs")
    second = sent_to_triggerer(first)
    second.conn_id = "second"

    def has_polled(account: str) -> bool:
        return polls_of(emulator, account) >= 10

    async def run() -> None:
        runs = [asyncio.ensure_future(anext(aiter(each.run()))) for each in (first, second)]
        for account in (client_id, EMULATOR):
            await until(partial(has_polled, account))
        for each in runs:
            each.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    in_loop(run)


def polls_of(emulator: RunningEmulator, account: str) -> int:
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


def test_an_outage_that_lasts_too_long_resumes_the_task(
    defer: Defer, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_triggerer, "OUTAGE_SECONDS", 1.0)
    trigger = defer("query_hangs")
    emulator.add_fault(
        "GetQueryStatus", "grpc_error", times=1000, code="UNAVAILABLE", message="down"
    )
    assert first_event(trigger) == {"results": {}}
    emulator.clear_faults()
    assert query_statuses(emulator) == ["InProgress", "InProgress"]


def test_a_call_without_a_reply_holds_up_nothing_and_is_abandoned(
    defer: Defer, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_triggerer, "CALL_SECONDS", 4.0)
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

    event, longest = asyncio.run(asyncio.wait_for(run(), SECONDS))
    assert set(event["results"]) == set(FILES)
    assert longest < in_triggerer.CALL_SECONDS, "the event loop was held up"


@pytest.mark.usefixtures("supervisor")
def test_an_outage_while_a_cluster_starts_is_ridden_out(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_triggerer, "START_POLL_SECONDS", 0.1)
    with running(starting(emulator, kind="startup_takes", seconds=60)) as fired:
        emulator.add_fault("GET compute/{id}", "http_error", times=3, status=503)
        eventually(lambda: emulator.state()["faults"] == [])
        assert fired == []
        emulator.advance_clock(MINUTE)
    assert fired == [{}]


# The end of the task


def kill_deferred(trigger: PolarsCloudTrigger) -> None:
    asyncio.run(trigger.on_kill())


@pytest.mark.parametrize("state", ["failed", "success", "skipped", "removed", None, "queued"])
def test_what_a_deferred_task_has_started_ends_when_a_user_ends_the_task(
    defer: Defer, emulator: RunningEmulator, supervisor: Supervisor, state: str | None
) -> None:
    trigger = defer("query_hangs")
    supervisor.states["manual__1"]["run_query"] = state
    kill_deferred(trigger)
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_triggerer_that_wakes_up_ends_nothing_of_a_task_that_another_one_watches(
    defer: Defer, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    kill_deferred(defer("query_hangs"))
    assert query_statuses(emulator) == ["InProgress", "InProgress"]
    assert cluster_statuses(emulator) == ["Running"]
    assert entries(supervisor, "task")


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
        await until(lambda: calls(emulator, "GetQueryStatus") >= 2)
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        await trigger.cleanup()

    in_loop(stop)
    assert query_statuses(emulator) == ["InProgress", "InProgress"]
    assert entries(supervisor, "task")


# The end of the task where Airflow only cancels its trigger, as a triggerer that stops does


def cancel_until_done(
    trigger: PolarsCloudTrigger, polls: Callable[[], object] = lambda: True
) -> None:
    """Run a trigger, and cancel it repeatedly, as Airflow 3.2 does."""

    async def cancel() -> None:
        run = asyncio.ensure_future(anext(aiter(trigger.run())))
        await asyncio.sleep(0)
        await until(polls)
        while not run.done():
            run.cancel()
            await asyncio.sleep(0.02)
        with pytest.raises(asyncio.CancelledError):
            await run

    in_loop(cancel)


EndDeferred = Callable[[PolarsCloudTrigger, str | None], None]


@pytest.fixture
def end_deferred(
    monkeypatch: pytest.MonkeyPatch, emulator: RunningEmulator, supervisor: Supervisor
) -> EndDeferred:
    """Change the state of a deferred task, and cancel its trigger as Airflow 3.2 does."""
    monkeypatch.setattr(triggers, "CALLS_ON_KILL", False)
    monkeypatch.setattr(in_triggerer, "KEEP_LOG_OPEN_SECONDS", SECONDS)

    def end(trigger: PolarsCloudTrigger, state: str | None) -> None:
        supervisor.states["manual__1"]["run_query"] = state
        cancel_until_done(trigger, lambda: calls(emulator, "GetQueryStatus") >= 2)

    return end


@pytest.mark.parametrize("state", ["failed", "success", "skipped", "removed"])
def test_a_canceled_trigger_ends_what_its_ended_task_has_started_before_its_log_is_closed(
    end_deferred: EndDeferred,
    defer: Defer,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    state: str,
) -> None:
    end_deferred(defer("query_hangs"), state)
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("end_deferred")
def test_a_trigger_that_is_canceled_before_it_polls_ends_what_its_task_has_started(
    defer: Defer, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    trigger = defer("query_hangs")
    del supervisor.states["manual__1"]  # the run was deleted
    cancel_until_done(trigger)
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert supervisor.variables == {}


@pytest.mark.parametrize(
    "state",
    [
        pytest.param("deferred", id="another_triggerer_has_taken_it_over"),
        pytest.param("scheduled", id="its_deferral_has_timed_out"),
        pytest.param("running", id="it_goes_on_in_its_worker"),
        pytest.param("up_for_retry", id="it_has_failed_and_is_tried_again"),
        pytest.param(None, id="it_was_cleared_a_moment_ago"),
    ],
)
def test_a_canceled_trigger_leaves_the_queries_of_an_active_task_alone(
    end_deferred: EndDeferred,
    defer: Defer,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    state: str | None,
) -> None:
    end_deferred(defer("query_hangs"), state)
    assert query_statuses(emulator) == ["InProgress", "InProgress"]
    assert cluster_statuses(emulator) == ["Running"]
    assert entries(supervisor, "task")


def test_a_trigger_of_a_triggerer_that_stops_waits_for_no_answer_of_airflows(
    end_deferred: EndDeferred,
    defer: Defer,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(in_triggerer, "KEEP_LOG_OPEN_SECONDS", 0.5)
    trigger = defer("query_hangs")
    supervisor.knows_states.clear()
    end_deferred(trigger, "deferred")
    assert query_statuses(emulator) == ["InProgress", "InProgress"]
    assert entries(supervisor, "task")
    supervisor.knows_states.set()


def test_a_canceled_trigger_to_which_airflow_gives_no_answer_leaves_its_task_alone_and_says_so(
    end_deferred: EndDeferred,
    defer: Defer,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trigger = defer("query_hangs")
    answer = supervisor.send

    def break_off(msg: Any) -> object:
        if isinstance(msg, comms.GetTaskStates):
            raise CancelledError("Reader loop exited")
        return answer(msg)

    monkeypatch.setattr(supervisor, "send", break_off)
    end_deferred(trigger, "failed")
    assert query_statuses(emulator) == ["InProgress", "InProgress"]
    assert entries(supervisor, "task")
    assert "Airflow did not report the task's state" in caplog.text


# Clusters


def starting(emulator: RunningEmulator, **fault: Any) -> ClusterTrigger:
    emulator.add_fault("POST manifest/start", **fault)
    ctx = register_manifest(CloudSession("polars_cloud"), CLUSTER, lambda: False)
    start_without_waiting(ctx)
    cluster_id = get_cluster_id(ctx)
    assert cluster_id is not None
    now = time.time()
    return ClusterTrigger(
        cluster_id=cluster_id,
        conn_id="polars_cloud",
        task_key="polars_cloud/task/1",
        not_before=now,
        resume_at=now + 60,
        deadline=None,
    )


@pytest.mark.usefixtures("supervisor")
def test_a_trigger_fires_without_news_when_the_cluster_is_running(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_triggerer, "START_POLL_SECONDS", 0.1)
    with running(starting(emulator, kind="startup_takes", seconds=60)) as fired:
        seen = calls(emulator, emulator.state()["clusters"][0]["id"])
        eventually(lambda: calls(emulator, emulator.state()["clusters"][0]["id"]) > seen + 2)
        assert fired == []
        emulator.advance_clock(MINUTE)
    assert fired == [{}]


@pytest.mark.usefixtures("supervisor")
def test_a_trigger_returns_why_the_cluster_has_not_started(emulator: RunningEmulator) -> None:
    trigger = starting(emulator, kind="startup_fails", message="no machines left")
    assert first_event(trigger) == {"failed": "no machines left"}


# The orphan sweep


class Sweeps:
    """Sweeps that have begun and ended, and the orphans that each one could not end."""

    def __init__(self) -> None:
        self.begun = 0
        self.at_once = 0
        self.left: list[list[EndFailure]] = []
        self.in_context: list[str] = []


task_of_log = ContextVar("task_of_log", default="nobody's")
"""Stands for Airflow's own variable, which selects a task's log in the triggerer."""


@pytest.fixture
def sweeps(
    monkeypatch: pytest.MonkeyPatch, pc: ModuleType, supervisor: Supervisor
) -> Iterator[Sweeps]:
    """Sweep continuously; the last sweep ends before the test does."""
    sweeps = Sweeps()

    def count(run: str = "", *, excluding: Collection[str] = ()) -> list[EndFailure]:
        sweeps.begun += 1
        sweeps.at_once = max(sweeps.at_once, sweeps.begun - len(sweeps.left))
        sweeps.in_context.append(task_of_log.get())
        left: list[EndFailure] = []
        try:
            left = end_orphans(run, excluding=excluding)
            return left
        finally:
            sweeps.left.append(left)

    monkeypatch.setattr(in_triggerer, "end_orphans", count)
    monkeypatch.setattr(in_triggerer, "FIRST_SWEEP_SECONDS", 0.0)
    monkeypatch.setattr(in_triggerer, "SWEEP_SECONDS", 0.1)
    yield sweeps
    eventually(lambda: sweeps.begun == len(sweeps.left), SECONDS)


def sweep_until(condition: Callable[[], object]) -> None:
    """Sweep, in a triggerer in which another task waits, until the condition holds."""

    async def wait() -> None:
        with watching_task("polars_cloud/task/other"):
            await until(condition)

    in_loop(wait)


def leave_orphan(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    *,
    task_id: str = "run_query",
    state: str = "failed",
    file: str = FILES[0],
    **options: Any,
) -> None:
    """Run a plain task whose worker is killed while its query runs."""

    def body() -> Iterator[None]:
        with use_cluster(CLUSTER | {"name": task_id}) as ctx:
            emulator.add_fault("SubmitQuery", "query_hangs")
            remote: Any = pl.LazyFrame({"x": [1]}).remote(ctx).single_node()
            remote.sink_parquet(file)
            yield

    kill(body, task_id=task_id, **options)
    supervisor.states["manual__1"][task_id] = state


def rewrite(supervisor: Supervisor, task_id: str, **fields: Any) -> None:
    """Change fields in all entries of a task."""
    for key, value in supervisor.variables.items():
        entry = json.loads(value)
        if entry["owner"][2] == task_id:
            supervisor.variables[key] = json.dumps(entry | fields)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        each.getMessage()
        for each in caplog.records
        if each.levelno == logging.WARNING and each.name.startswith("polars_remote")
    ]


@pytest.mark.parametrize("state", ["failed", "success", "skipped", "removed", None])
def test_what_an_ended_plain_task_has_left_is_swept(
    sweeps: Sweeps, emulator: RunningEmulator, supervisor: Supervisor, state: str | None
) -> None:
    leave_orphan(emulator, supervisor)
    if state is None:  # the run was deleted
        del supervisor.states["manual__1"]
    else:
        supervisor.states["manual__1"]["run_query"] = state
    sweep_until(lambda: not supervisor.variables)
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]


def test_what_a_deferred_task_has_left_that_ended_without_a_triggerer_is_swept(
    sweeps: Sweeps, defer: Defer, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    defer("query_hangs")
    supervisor.states["manual__1"]["run_query"] = "failed"
    sweep_until(lambda: not supervisor.variables)
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.parametrize("state", ["running", "deferred", "queued", "scheduled", "up_for_retry"])
def test_what_an_active_task_has_started_is_not_swept(
    sweeps: Sweeps, emulator: RunningEmulator, supervisor: Supervisor, state: str
) -> None:
    leave_orphan(emulator, supervisor, state=state)
    sweep_until(lambda: len(sweeps.left) >= 3)
    assert query_statuses(emulator) == ["InProgress"]
    assert cluster_statuses(emulator) == ["Running"]
    assert entries(supervisor, "task")
    assert entries(supervisor, "cluster")


def test_what_a_watched_task_has_started_is_not_swept_before_its_trigger_stops(
    sweeps: Sweeps, defer: Defer, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    trigger = defer("query_hangs")

    async def watch() -> None:
        run = asyncio.ensure_future(anext(aiter(trigger.run())))
        await until(lambda: sweeps.begun)
        supervisor.states["manual__1"]["run_query"] = "failed"
        swept = len(sweeps.left)
        await until(lambda: len(sweeps.left) >= swept + 3)
        assert query_statuses(emulator) == ["InProgress", "InProgress"]
        assert cluster_statuses(emulator) == ["Running"]
        assert entries(supervisor, "task")
        assert entries(supervisor, "cluster")
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        await until(lambda: not supervisor.variables)

    in_loop(watch)
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]


def test_the_sweep_continues_when_no_task_waits(
    sweeps: Sweeps, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    leave_orphan(emulator, supervisor, state="running")

    async def wait() -> None:
        with watching_task("polars_cloud/task/other"):
            await until(lambda: sweeps.left)
        supervisor.states["manual__1"]["run_query"] = "failed"
        await until(lambda: not supervisor.variables)

    in_loop(wait)
    assert query_statuses(emulator) == ["Canceled"]


def test_nothing_is_swept_where_airflow_cannot_list_variables(
    sweeps: Sweeps, defer: Defer, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_triggerer, "LISTS_VARIABLES", False)
    with running(defer()):
        eventually(lambda: calls(emulator, "GetQueryStatus") >= 6)
        emulator.advance_clock(MINUTE)
    assert sweeps.begun == 0


def test_one_sweep_at_a_time_serves_all_tasks_of_a_triggerer(sweeps: Sweeps) -> None:
    async def wait() -> None:
        with contextlib.ExitStack() as stack:
            for number in range(5):
                stack.enter_context(watching_task(f"polars_cloud/task/{number}"))
            await until(lambda: len(sweeps.left) >= 5)

    in_loop(wait)
    assert sweeps.at_once == 1


def test_the_log_of_the_sweep_is_nobodys_tasks(
    sweeps: Sweeps, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    leave_orphan(emulator, supervisor)

    async def wait() -> None:
        task_of_log.set("the first trigger's")
        with watching_task("polars_cloud/task/other"):
            await until(lambda: not supervisor.variables)

    in_loop(wait)
    assert set(sweeps.in_context) == {"nobody's"}


def test_an_orphan_is_ended_with_the_login_of_its_own_connection(
    sweeps: Sweeps,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client_id, secret = emulator.add_service_account("second")
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", f"http://{client_id}:{secret}@")
    leave_orphan(emulator, supervisor, conn_id="second")
    leave_orphan(emulator, supervisor, task_id="other", file=FILES[1])
    sweep_until(lambda: not supervisor.variables)
    cancels = [each["account"] for each in emulator.journal() if "CancelQuery" in each["path"]]
    assert sorted(cancels) == sorted([EMULATOR, client_id])


def test_an_entry_that_cannot_be_ended_is_warned_of_once(
    sweeps: Sweeps,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    leave_orphan(emulator, supervisor)
    rewrite(supervisor, "run_query", conn_id="nowhere")
    caplog.clear()
    sweep_until(lambda: len(sweeps.left) >= 4)
    [query] = emulator.state()["queries"]
    [sentence] = warnings_of(caplog)
    assert sentence.startswith(
        f"Could not end query {query['id']} for {FILES[0]} on cluster {query['cluster_id']} of "
        "shop.run_query in run manual__1: The Airflow Connection 'nowhere' is missing"
    )
    assert sentence.endswith(
        "service account. The next try, clean_up or the orphan sweep will try again"
    )
    assert entries(supervisor, "task")
    assert entries(supervisor, "cluster")


def test_a_cluster_whose_use_cannot_be_ended_is_warned_of_once(
    sweeps: Sweeps,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    leave_orphan(emulator, supervisor)
    rewrite(supervisor, "run_query", conn_id="nowhere")
    for key in [key for key in supervisor.variables if key.startswith(record.TASKS)]:
        record.erase(key)
    caplog.clear()
    sweep_until(lambda: len(sweeps.left) >= 4)
    [sentence] = warnings_of(caplog)
    assert sentence.startswith(
        "Could not end the use of the cluster of manifest run_query of shop.run_query in run "
        "manual__1: The Airflow Connection 'nowhere' is missing"
    )
    assert entries(supervisor, "cluster")


def test_an_entry_that_could_not_be_ended_for_a_while_is_ended_at_last(
    sweeps: Sweeps,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    leave_orphan(emulator, supervisor)
    rewrite(supervisor, "run_query", conn_id="nowhere")
    caplog.clear()

    async def wait() -> None:
        with watching_task("polars_cloud/task/other"):
            await until(lambda: len(sweeps.left) >= 2)
            rewrite(supervisor, "run_query", conn_id="polars_cloud")
            await until(lambda: not supervisor.variables)

    in_loop(wait)
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]


ORPHANS = sorted(
    ("run_query", "other"),
    key=lambda task_id: record.task_key(Owner("shop", "manual__1", task_id, -1)),
)
"""Tasks in the order in which they are swept."""


@pytest.mark.parametrize("bad", ORPHANS)
def test_an_entry_that_cannot_be_ended_does_not_keep_others_from_being_swept(
    sweeps: Sweeps, emulator: RunningEmulator, supervisor: Supervisor, bad: str
) -> None:
    for task_id, file in zip(ORPHANS, FILES, strict=True):
        leave_orphan(emulator, supervisor, task_id=task_id, file=file)
    rewrite(supervisor, bad, conn_id="nowhere")
    [good] = [each for each in ORPHANS if each != bad]
    sweep_until(
        lambda: len(entries(supervisor, "task")) == len(entries(supervisor, "cluster")) == 1
    )
    assert {entry["owner"][2] for entry in entries(supervisor, "task")} == {bad}
    statuses = {query["output_location"]: query["status"] for query in emulator.state()["queries"]}
    assert statuses[FILES[ORPHANS.index(good)]] == "Canceled"
    assert statuses[FILES[ORPHANS.index(bad)]] == "InProgress"


@pytest.mark.parametrize("text", ["{}", '{"owner": 1}', "no JSON"])
def test_an_entry_that_cannot_be_read_does_not_keep_others_from_being_swept(
    sweeps: Sweeps,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    text: str,
) -> None:
    leave_orphan(emulator, supervisor)
    unreadable = {f"{record.TASKS}0/0/0", f"{record.CLUSTERS}0/0/0"}
    supervisor.variables |= dict.fromkeys(unreadable, text)
    caplog.clear()
    sweep_until(lambda: set(supervisor.variables) == unreadable and len(sweeps.left) >= 4)
    assert query_statuses(emulator) == ["Canceled"]
    warned = warnings_of(caplog)
    assert len(warned) == len(unreadable)
    for key in unreadable:
        assert any(key in sentence for sentence in warned)


def test_a_sweep_that_fails_as_a_whole_is_retried(
    sweeps: Sweeps,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_orphan(emulator, supervisor)
    find_keys = record.find_keys
    answers = iter([False, False])

    def find_keys_later(prefix: str, run: str = "") -> list[str]:
        if next(answers, True):
            return find_keys(prefix, run)
        raise ConnectionError("Airflow does not answer")

    monkeypatch.setattr(record, "find_keys", find_keys_later)
    sweep_until(lambda: not supervisor.variables)
    assert "Orphan sweep failed, retrying in 0 s: Airflow does not answer" in caplog.text
    assert query_statuses(emulator) == ["Canceled"]
