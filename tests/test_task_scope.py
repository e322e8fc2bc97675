"""`task_scope.py`: what a task has submitted ends with the task, and nothing else does."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowTaskTimeout
from airflow.sdk.execution_time.timeout import timeout as execution_timeout

from include.polars_remote import task_scope
from include.polars_remote.client_internals import get_query_id
from include.polars_remote.clusters import compute_context, use_cluster
from include.polars_remote.queries import leave, run_query, submit, wait_for
from include.polars_remote.recorded_queries import describe
from include.polars_remote.task_scope import TaskKilled, current_scope
from polars_cloud_emulator.testing import RunningEmulator, eventually
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, freeze, kill

FILE = "s3://your-bucket/results/two.parquet"
OTHER_FILE = "s3://your-bucket/results/other.parquet"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})
CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}

ENDED = ["failed", "success", "skipped", "restarting", "upstream_failed", "removed"]
NOT_ENDED = ["running", "queued", "scheduled", "up_for_retry", None]


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    """The log tells what it tells in Airflow."""
    caplog.set_level("INFO", "include")


@pytest.fixture
def new_ctx(pc: ModuleType) -> Callable[[], Any]:
    """A context of the same cluster each time, as each try makes one."""
    return lambda: compute_context(CLUSTER)


@pytest.fixture
def hang(emulator: RunningEmulator, new_ctx: Callable[[], Any]) -> Callable[..., Any]:
    """Submit a query that runs until it is canceled."""

    def submit_hanging(uri: str = FILE) -> Any:
        emulator.add_fault("SubmitQuery", "query_hangs")
        return submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, uri)

    return submit_hanging


# The end of the task


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), AirflowTaskTimeout()])
def test_all_that_a_task_has_submitted_ends_when_it_fails(
    hang: Callable[..., Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    error: BaseException,
) -> None:
    with start_try(raises=type(error)):
        hang(FILE)
        hang(OTHER_FILE)
        raise error
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert supervisor.variables == {}


def test_one_query_that_fails_ends_the_other_with_the_task(
    hang: Callable[..., Any],
    new_ctx: Callable[[], Any],
    emulator: RunningEmulator,
    start_try: StartTry,
) -> None:
    with start_try(raises=pl.exceptions.SchemaError):
        ctx = compute_context({**CLUSTER, "cluster_size": 2})
        emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
        first = submit(TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE)
        hang(OTHER_FILE)
        wait_for(first)
    assert query_statuses(emulator) == ["Failed", "Canceled"]


def test_a_time_out_cancels_the_query(
    hang: Callable[..., Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(raises=AirflowTaskTimeout):
        query = hang()
        with execution_timeout(0.5):
            wait_for(query)
    assert query_statuses(emulator) == ["Canceled"]


def test_a_query_that_cannot_be_waited_for_is_canceled(
    hang: Callable[..., Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(raises=RuntimeError, match="for good"):
        query = hang()
        emulator.add_fault("GetQueryStatus", "grpc_error", code="NOT_FOUND", message="for good")
        wait_for(query)
    assert query_statuses(emulator) == ["Canceled"]


def test_a_query_that_nobody_has_waited_for_is_an_error_and_canceled(
    hang: Callable[..., Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(raises=RuntimeError, match=f"{FILE} is canceled, as nobody has waited"):
        hang()
    assert query_statuses(emulator) == ["Canceled"]


def test_a_temporary_result_that_nobody_has_waited_for_is_an_error_and_canceled(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try(raises=RuntimeError, match=r"temporary result .* nobody has waited"):
        submit(TWO_ROWS.remote(new_ctx()).single_node().execute)
    assert query_statuses(emulator) == ["Canceled"]


def test_a_task_that_has_succeeded_leaves_nothing_on_record(
    new_ctx: Callable[[], Any], start_try: StartTry, supervisor: Supervisor
) -> None:
    with start_try():
        run_query(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)
        [entry] = entries(supervisor, "task")
        assert list(entry["queries"]) == [FILE]
    assert supervisor.variables == {}


def test_an_ended_query_is_not_asked_about_at_the_end_of_the_task(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try():
        run_query(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)
        before = len(emulator.journal())
    assert len(emulator.journal()) == before
    assert calls(emulator, "CancelQuery") == 0


def test_a_task_that_submits_nothing_writes_nothing_down(
    start_try: StartTry, supervisor: Supervisor, emulator: RunningEmulator
) -> None:
    with start_try():
        assert supervisor.variables == {}


def test_a_cancel_that_was_not_heard_is_repeated(
    hang: Callable[..., Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(raises=KeyError):
        hang()
        emulator.add_fault("CancelQuery", "connection_reset")
        raise KeyError
    assert query_statuses(emulator) == ["Canceled"]


@pytest.mark.usefixtures("short_outages")
def test_a_cancel_that_fails_is_logged_and_the_query_stays_on_record_for_the_next_try(
    hang: Callable[..., Any],
    new_ctx: Callable[[], Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with start_try(raises=KeyError):
        query = hang()
        emulator.add_fault("CancelQuery", "connection_reset", times=1_000)
        raise KeyError
    assert f"Query {describe(query)} could not be canceled" in caplog.text
    [entry] = entries(supervisor, "task")
    assert entry["queries"][FILE]["query_id"] == get_query_id(query)

    # The task has failed: its next try asks for everything anew.
    with pytest.raises(ConnectionError, match="could not be canceled"), start_try(2):
        raise AssertionError("the body ran beside the query of the first try")
    emulator.clear_faults()
    with start_try(3):
        run_query(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)
    assert query_statuses(emulator) == ["Canceled", "Success"]
    assert supervisor.variables == {}


def test_what_goes_wrong_while_an_error_is_on_its_way_does_not_replace_it(
    hang: Callable[..., Any],
    start_try: StartTry,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(_: object) -> None:
        raise ConnectionError("Airflow is unavailable")

    with start_try(raises=KeyError, match="mine"):
        hang()
        monkeypatch.setattr(supervisor, "send", refuse)
        raise KeyError("mine")
    assert "it stays on record" in caplog.text
    assert "Airflow is unavailable" in caplog.text


def test_nothing_is_submitted_that_could_not_be_recorded(
    new_ctx: Callable[[], Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise ConnectionError("Airflow is unavailable")

    with start_try(raises=ConnectionError, match="Airflow is unavailable"):
        remote = TWO_ROWS.remote(new_ctx()).single_node()
        monkeypatch.setattr(supervisor, "send", refuse)
        submit(remote.sink_parquet, FILE)
    assert query_statuses(emulator) == []


# SIGTERM


@pytest.fixture
def sigterm(emulator: RunningEmulator) -> Iterator[Callable[[Any], None]]:
    """Let Airflow's own handler run in a try while it waits for its query."""
    before = signal.getsignal(signal.SIGTERM)

    def send(ti: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: ti.task.on_kill())
        asked = calls(emulator, "GetQueryStatus")

        def kill() -> None:
            eventually(lambda: calls(emulator, "GetQueryStatus") > asked)
            os.kill(os.getpid(), signal.SIGTERM)

        background.submit(kill)

    with ThreadPoolExecutor() as background:
        yield send
    signal.signal(signal.SIGTERM, before)


def test_a_user_who_ends_a_task_in_mid_query_cancels_the_query(
    hang: Callable[..., Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    sigterm: Callable[[Any], None],
) -> None:
    with start_try(raises=TaskKilled) as ti:
        query = hang()
        supervisor.states["manual__1"]["run_query"] = "failed"
        sigterm(ti)
        wait_for(query)
    assert query_statuses(emulator) == ["Canceled"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("state", ENDED)
def test_sigterm_to_a_task_that_was_ended_ends_its_queries_and_its_cluster(
    hang: Callable[..., Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    state: str,
) -> None:
    with start_try(raises=TaskKilled) as ti, use_cluster(CLUSTER):
        hang(FILE)
        hang(OTHER_FILE)
        supervisor.states["manual__1"]["run_query"] = state
        ti.task.on_kill()
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("state", NOT_ENDED)
def test_sigterm_to_a_worker_alone_leaves_everything_to_the_next_try(
    hang: Callable[..., Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    state: str | None,
) -> None:
    with start_try(raises=TaskKilled) as ti, use_cluster(CLUSTER):
        first = hang()
        supervisor.states["manual__1"]["run_query"] = state
        ti.task.on_kill()
    assert "nobody has ended the task" in caplog.text
    assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
    assert cluster_statuses(emulator) == ["Running"]
    assert len(supervisor.variables) == 2
    with start_try(2), use_cluster(CLUSTER):
        assert get_query_id(hang()) == get_query_id(first)
        first.cancel()
        current_scope().set_awaited(get_query_id(first))
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_sigterm_while_airflow_does_not_answer_leaves_everything_to_the_next_try(
    hang: Callable[..., Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with start_try(raises=TaskKilled) as ti, use_cluster(CLUSTER):
        first = hang()
        supervisor.knows_states.clear()
        began = time.monotonic()
        ti.task.on_kill()
    # Airflow's SIGKILL comes 5 seconds after SIGTERM.
    assert time.monotonic() - began < task_scope.GRACE_SECONDS
    supervisor.knows_states.set()
    assert "Airflow does not say why" in caplog.text
    assert query_statuses(emulator) == ["InProgress"]
    with start_try(2):
        second = hang()
        assert get_query_id(second) == get_query_id(first)
        second.cancel()  # nobody has to wait for it before the cluster stops
        leave(second)


def test_sigterm_to_a_mapped_task_asks_for_the_state_of_its_own_index(
    hang: Callable[..., Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
) -> None:
    supervisor.states["manual__1"] |= {"run_query_0": "failed"}
    with start_try(map_index=1, raises=TaskKilled) as ti:
        hang()
        ti.task.on_kill()
    assert query_statuses(emulator) == ["InProgress"]


def test_ending_takes_no_longer_than_airflow_waits_after_sigterm(
    hang: Callable[..., Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(task_scope, "GRACE_SECONDS", 0.5)
    with start_try(raises=TaskKilled) as ti:
        query = hang()
        supervisor.states["manual__1"]["run_query"] = "failed"
        emulator.add_fault("GetQueryStatus", "stall", times=1_000)
        ti.task.on_kill()
    assert f"Query {describe(query)} could not be canceled" in caplog.text
    # Left to whoever comes next, and no longer to be resumed.
    assert [entry["over"] for entry in entries(supervisor, "task")] == [True]


def test_sigterm_ends_a_try_with_the_exit_code_of_a_failure(ti: Any) -> None:
    with pytest.raises(SystemExit) as raised:
        ti.task.on_kill()
    assert raised.value.code == 143


def test_a_time_out_that_calls_on_kill_stays_a_time_out(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(raises=AirflowTaskTimeout) as ti:
        try:
            raise AirflowTaskTimeout
        except AirflowTaskTimeout:
            ti.task.on_kill()
            raise


# Tasks that were cleared


@pytest.mark.parametrize("state", ["InProgress", "Success"])
def test_a_task_that_is_cleared_ends_the_old_queries_and_submits_everything_anew(
    emulator: RunningEmulator,
    new_ctx: Callable[[], Any],
    start_try: StartTry,
    supervisor: Supervisor,
    state: str,
) -> None:
    def body() -> Iterator[None]:
        remote = TWO_ROWS.remote(new_ctx()).single_node()
        if state == "InProgress":
            emulator.add_fault("SubmitQuery", "query_hangs", times=3)
        submit(remote.sink_parquet, FILE)
        submit(remote.sink_parquet, OTHER_FILE)
        submit(remote.execute)
        yield

    kill(body)
    if state == "Success":
        eventually(lambda: query_statuses(emulator) == ["Success"] * 3)
    with start_try(2, clear_number=1):
        remote = TWO_ROWS.remote(new_ctx()).single_node()
        queries = [
            submit(remote.sink_parquet, FILE),
            submit(remote.sink_parquet, OTHER_FILE),
            submit(remote.execute),
        ]
        for query in queries:
            wait_for(query)
    old = "Canceled" if state == "InProgress" else "Success"
    assert query_statuses(emulator) == [old] * 3 + ["Success"] * 3
    assert supervisor.variables == {}


def test_a_cleared_try_that_is_killed_is_resumed_as_any_other(
    hang: Callable[..., Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[Any]:
        yield hang()

    kill(body)
    second = kill(body, 2, clear_number=1)
    with start_try(3, clear_number=1):
        third = hang()
        assert get_query_id(third) == get_query_id(second)
        leave(third)
    eventually(lambda: query_statuses(emulator) == ["Canceled", "InProgress"])


# Only the owner


def test_a_frozen_worker_cancels_nothing_and_stops_nothing_once_the_next_try_has_taken_over(
    emulator: RunningEmulator,
    start_try: StartTry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def submit_slow(ctx: Any) -> Any:
        return submit(TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE)

    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER) as ctx:
            yield submit_slow(ctx)

    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    frozen = freeze(body)
    with start_try(2), use_cluster(CLUSTER) as ctx:
        query = submit_slow(ctx)
        frozen.wake(AirflowTaskTimeout())
        assert "A later try has taken over" in caplog.text
        assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
        assert cluster_statuses(emulator) == ["Running"]
        emulator.advance_clock(timedelta(seconds=60))
        assert wait_for(query).location == [FILE]
    assert query_statuses(emulator) == ["Success"]
    assert cluster_statuses(emulator) == ["Stopped"]


def test_a_frozen_worker_whose_query_ends_well_stops_nothing_either(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER), suppress(KeyError):
            yield

    frozen = freeze(body)
    with start_try(2), use_cluster(CLUSTER):
        frozen.wake(KeyError())
        assert cluster_statuses(emulator) == ["Idle"]
        assert len(entries(supervisor, "cluster")) == 1
    assert cluster_statuses(emulator) == ["Stopped"]


def test_a_frozen_worker_is_told_apart_although_the_next_try_has_submitted_nothing_yet(
    hang: Callable[..., Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[Any]:
        yield hang()

    frozen = freeze(body)
    with start_try(2):
        frozen.wake(AirflowTaskTimeout())
        assert query_statuses(emulator) == ["InProgress"]
        leave(hang())


def test_what_the_next_try_has_not_resumed_ends_with_it(
    hang: Callable[..., Any], emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[None]:
        yield hang()

    kill(body)
    with start_try(2):
        pass  # its code has no query any more
    assert query_statuses(emulator) == ["Canceled"]
    assert supervisor.variables == {}


def test_the_scope_ends_with_the_task(start_try: StartTry, emulator: RunningEmulator) -> None:
    with start_try():
        assert current_scope().conn_id == "polars_cloud"
    with pytest.raises(RuntimeError, match="Put @authenticate below @task"):
        current_scope()
