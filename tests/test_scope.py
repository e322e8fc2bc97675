"""`ownership/scope.py`, `kills.py`: queries and clusters of a task end with the task."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowTaskTimeout
from airflow.sdk.execution_time.timeout import timeout as execution_timeout

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import detach, use_cluster
from polars_remote.cloud.client import get_query_id
from polars_remote.errors import (
    NotAuthenticatedError,
    QueryNotAwaitedError,
    QueryRefusedError,
    TakenOverError,
)
from polars_remote.ownership import kills
from polars_remote.ownership.kills import TaskKilled
from polars_remote.ownership.scope import current_scope
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, freeze, kill

FILE = "s3://your-bucket/results/two.parquet"
OTHER_FILE = "s3://your-bucket/results/other.parquet"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})
CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}

ENDED = ["failed", "success", "skipped", "restarting", "upstream_failed", "removed"]
NOT_ENDED = ["running", "queued", "scheduled", "up_for_retry", None]

Hang = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("pc")


def test_a_second_copy_of_the_library_is_warned_of(
    start_try: StartTry,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    other = tmp_path / "polars_remote"
    other.mkdir()
    (other / "__init__.py").write_text('__version__ = "0.9.0"\n')
    monkeypatch.syspath_prepend(tmp_path)
    with start_try():
        pass
    assert f"which hides {other} (0.9.0): delete all but one" in caplog.text


@pytest.fixture
def hang(emulator: RunningEmulator) -> Hang:
    """Submit a query that runs until it is canceled."""

    def submit_hanging(ctx: Any, uri: str = FILE) -> Any:
        emulator.add_fault("SubmitQuery", "query_hangs")
        return submit(ctx, uri)

    return submit_hanging


def submit(ctx: Any, uri: str = FILE) -> Any:
    return TWO_ROWS.remote(ctx).single_node().sink_parquet(uri)


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only briefly for a query that the task has not returned."""
    monkeypatch.setattr("polars_remote.waiting.deferral.IN_WORKER_SECONDS", 0.1)


# The end of the task


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), AirflowTaskTimeout()])
def test_all_that_a_task_has_submitted_ends_when_it_fails(
    hang: Hang,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    error: BaseException,
) -> None:
    with start_try(raises=type(error)), use_cluster(CLUSTER, stop=False) as ctx:
        hang(ctx, FILE)
        hang(ctx, OTHER_FILE)
        raise error
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert supervisor.variables == {}


def test_one_query_that_fails_ends_the_other_with_the_task(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    cluster = {**CLUSTER, "cluster_size": 2}
    with start_try(raises=pl.exceptions.SchemaError), use_cluster(cluster, stop=False) as ctx:
        emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
        first = submit(ctx)
        hang(ctx, OTHER_FILE)
        first.await_result()
    assert query_statuses(emulator) == ["Failed", "Canceled"]
    assert supervisor.variables == {}


def test_a_time_out_cancels_the_query(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    with start_try(raises=AirflowTaskTimeout), use_cluster(CLUSTER, stop=False) as ctx:
        query = hang(ctx)
        with execution_timeout(0.5):
            query.await_result()
    assert query_statuses(emulator) == ["Canceled"]
    assert supervisor.variables == {}


def test_a_query_that_cannot_be_waited_for_is_canceled(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry
) -> None:
    raises = {"raises": RuntimeError, "match": "for good"}
    with start_try(**raises), use_cluster(CLUSTER, stop=False) as ctx:
        query = hang(ctx)
        emulator.add_fault("GetQueryStatus", "grpc_error", code="NOT_FOUND", message="for good")
        query.await_result()
    assert query_statuses(emulator) == ["Canceled"]


@pytest.mark.usefixtures("short_wait")
def test_a_query_that_nobody_has_waited_for_is_an_error_and_canceled(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    raises = {"raises": QueryNotAwaitedError, "match": f"has not waited .* for {FILE}, so"}
    with start_try(**raises), use_cluster(CLUSTER, stop=False) as ctx:
        hang(ctx)
    assert query_statuses(emulator) == ["Canceled"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("short_wait")
def test_a_temporary_result_that_nobody_has_waited_for_is_an_error_and_canceled(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    raises = {"raises": QueryNotAwaitedError, "match": "has not waited .* temporary result"}
    with start_try(**raises), use_cluster(CLUSTER, stop=False) as ctx:
        TWO_ROWS.remote(ctx).single_node().execute(blocking=False)
    assert query_statuses(emulator) == ["Canceled"]


def test_a_task_that_has_succeeded_leaves_nothing_on_record(
    start_try: StartTry, supervisor: Supervisor
) -> None:
    with start_try(), use_cluster(CLUSTER, stop=False) as ctx:
        submit(ctx).await_result()
        [entry] = entries(supervisor, "task")
        assert list(entry["queries"]) == [FILE]
    assert supervisor.variables == {}


def test_an_ended_query_is_not_asked_about_at_the_end_of_the_task(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(), use_cluster(CLUSTER, stop=False) as ctx:
        submit(ctx).await_result()
        before = len(emulator.journal())
    assert len(emulator.journal()) == before
    assert calls(emulator, "CancelQuery") == 0


def test_a_task_that_submits_nothing_writes_nothing_down(
    start_try: StartTry, supervisor: Supervisor
) -> None:
    with start_try():
        assert supervisor.variables == {}


def test_a_cancel_that_was_not_heard_is_repeated(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(raises=KeyError), use_cluster(CLUSTER, stop=False) as ctx:
        hang(ctx)
        emulator.add_fault("CancelQuery", "connection_reset")
        raise KeyError
    assert query_statuses(emulator) == ["Canceled"]


@pytest.mark.usefixtures("short_outages")
def test_a_cancel_that_fails_is_logged_and_the_query_stays_on_record_for_the_next_try(
    hang: Hang,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with start_try(raises=KeyError), use_cluster(CLUSTER, stop=False) as ctx:
        query = hang(ctx)
        emulator.add_fault("CancelQuery", "connection_reset", times=1_000)
        raise KeyError
    [cluster] = emulator.state()["clusters"]
    left = f"Could not end query {get_query_id(query)} for {FILE} on cluster {cluster['id']}"
    assert f"{left} of shop.run_query in run manual__1: " in caplog.text
    assert "The next try, clean_up or the orphan sweep will try again" in caplog.text
    [entry] = entries(supervisor, "task")
    assert entry["queries"][FILE]["query_id"] == get_query_id(query)

    # The task has failed, so its next try submits all queries again.
    with (
        pytest.raises(ConnectionError, match="Queries of an earlier try are still running"),
        start_try(2),
    ):
        raise AssertionError("the body ran beside the query of the first try")
    emulator.clear_faults()
    with start_try(3), use_cluster(CLUSTER, stop=False) as ctx:
        submit(ctx).await_result()
    assert query_statuses(emulator) == ["Canceled", "Success"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("short_outages")
def test_a_stop_that_is_refused_changes_nothing_about_the_tasks_result(
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with start_try(), use_cluster(CLUSTER) as ctx:
        submit(ctx).await_result()
        refusal = {"status": 403, "message": "of a fault", "times": 1_000}
        emulator.add_fault("POST compute/{id}/stop", "http_error", **refusal)
    assert cluster_statuses(emulator) == ["Idle"]
    left = "Could not end the use of the cluster of manifest shop of shop.run_query in run manual"
    assert left in caplog.text
    assert len(entries(supervisor, "cluster")) == 1


def test_what_goes_wrong_while_an_error_is_on_its_way_does_not_replace_it(
    hang: Hang,
    start_try: StartTry,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(_: object) -> None:
        raise ConnectionError("Airflow is unavailable")

    raises = {"raises": KeyError, "match": "mine"}
    with start_try(**raises), use_cluster(CLUSTER, stop=False) as ctx:
        hang(ctx)
        monkeypatch.setattr(supervisor, "send", refuse)
        raise KeyError("mine")
    assert "the task's queries keep running (Airflow is unavailable)" in caplog.text


def test_nothing_is_submitted_that_could_not_be_recorded(
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise ConnectionError("Airflow is unavailable")

    raises = {"raises": ConnectionError, "match": "Airflow is unavailable"}
    with start_try(**raises), use_cluster(CLUSTER, stop=False) as ctx:
        monkeypatch.setattr(supervisor, "send", refuse)
        submit(ctx)
    assert query_statuses(emulator) == []


def test_a_thread_that_outlives_its_task_submits_nothing(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def submit_late(ctx: Any) -> None:
        is_over.wait()
        submit(ctx)

    is_over = Event()
    with ThreadPoolExecutor() as threads:
        with start_try(), use_cluster(CLUSTER, stop=False) as ctx:
            late = threads.submit(submit_late, ctx)
        is_over.set()
        with pytest.raises(QueryRefusedError, match="its task has ended"):
            late.result()
    assert query_statuses(emulator) == []
    assert supervisor.variables == {}


# SIGTERM


@pytest.fixture
def sigterm(emulator: RunningEmulator) -> Iterator[Callable[[Any], None]]:
    """Send SIGTERM to a try that waits for its query, with Airflow's own handler."""
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
    hang: Hang,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    sigterm: Callable[[Any], None],
) -> None:
    with start_try(raises=TaskKilled) as ti, use_cluster(CLUSTER, stop=False) as ctx:
        query = hang(ctx)
        supervisor.states["manual__1"]["run_query"] = "failed"
        sigterm(ti)
        query.await_result()
    assert query_statuses(emulator) == ["Canceled"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("state", ENDED)
def test_sigterm_to_a_task_that_was_ended_ends_its_queries_and_its_cluster(
    hang: Hang,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    state: str,
) -> None:
    with start_try(raises=TaskKilled) as ti, use_cluster(CLUSTER) as ctx:
        hang(ctx, FILE)
        hang(ctx, OTHER_FILE)
        supervisor.states["manual__1"]["run_query"] = state
        ti.task.on_kill()
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("state", ["failed", "running"])
def test_a_task_that_catches_the_kill_has_not_succeeded(
    hang: Hang,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    state: str,
) -> None:
    with start_try(raises=TaskKilled) as ti, suppress(SystemExit), use_cluster(CLUSTER) as ctx:
        hang(ctx)
        supervisor.states["manual__1"]["run_query"] = state
        ti.task.on_kill()
    is_ended = state == "failed"
    assert [query["cancels"] for query in emulator.state()["queries"]] == [int(is_ended)]
    assert cluster_statuses(emulator) == ["Stopped" if is_ended else "Running"]
    assert len(supervisor.variables) == (0 if is_ended else 2)


@pytest.mark.parametrize("state", NOT_ENDED)
def test_sigterm_to_a_worker_alone_leaves_everything_to_the_next_try(
    hang: Hang,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    state: str | None,
) -> None:
    with start_try(raises=TaskKilled) as ti, use_cluster(CLUSTER) as ctx:
        first = hang(ctx)
        supervisor.states["manual__1"]["run_query"] = state
        ti.task.on_kill()
    assert "The worker is shutting down. The task's queries keep running" in caplog.text
    assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
    assert cluster_statuses(emulator) == ["Running"]
    assert len(supervisor.variables) == 2
    with start_try(2), use_cluster(CLUSTER) as ctx:
        second = hang(ctx)
        assert get_query_id(second) == get_query_id(first)
        second.cancel()
        assert second.await_result().status.name == "CANCELED"
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_coroutine_that_is_cancelled_as_its_worker_shuts_down_leaves_everything_to_the_next_try(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    with start_try(raises=asyncio.CancelledError) as ti, use_cluster(CLUSTER) as ctx:
        hang(ctx)
        supervisor.states["manual__1"]["run_query"] = "running"
        with suppress(TaskKilled):  # Airflow's event loop converts one exception into the other
            ti.task.on_kill()
        raise asyncio.CancelledError
    assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
    assert cluster_statuses(emulator) == ["Running"]
    assert len(supervisor.variables) == 2


def test_sigterm_while_airflow_does_not_answer_leaves_everything_to_the_next_try(
    hang: Hang,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with start_try(raises=TaskKilled) as ti, use_cluster(CLUSTER) as ctx:
        first = hang(ctx)
        supervisor.knows_states.clear()
        began = time.monotonic()
        ti.task.on_kill()
    # Airflow's SIGKILL comes 5 seconds after SIGTERM.
    assert time.monotonic() - began < kills.GRACE_SECONDS
    supervisor.knows_states.set()
    assert "Airflow did not report the task's state" in caplog.text
    assert query_statuses(emulator) == ["InProgress"]
    with start_try(2), use_cluster(CLUSTER) as ctx:
        second = hang(ctx)
        assert get_query_id(second) == get_query_id(first)
        second.cancel()  # its end need not be awaited before the cluster stops
        detach(second)


def test_sigterm_to_a_mapped_task_asks_for_the_state_of_its_own_index(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    supervisor.states["manual__1"] |= {"run_query_0": "failed"}
    raises = {"raises": TaskKilled}
    with start_try(map_index=1, **raises) as ti, use_cluster(CLUSTER, stop=False) as ctx:
        hang(ctx)
        ti.task.on_kill()
    assert query_statuses(emulator) == ["InProgress"]


def test_ending_takes_no_longer_than_airflow_waits_after_sigterm(
    hang: Hang,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kills, "GRACE_SECONDS", 0.5)
    with start_try(raises=TaskKilled) as ti, use_cluster(CLUSTER, stop=False) as ctx:
        query = hang(ctx)
        supervisor.states["manual__1"]["run_query"] = "failed"
        emulator.add_fault("GetQueryStatus", "stall", times=1_000)
        ti.task.on_kill()
    assert f"Could not end query {get_query_id(query)} for {FILE}" in caplog.text
    # Still on record for the next process, and not resumable.
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
def test_a_cleared_task_cancels_the_old_queries_and_submits_all_again(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor, state: str
) -> None:
    def submit_three(ctx: Any) -> list[Any]:
        temporary = TWO_ROWS.remote(ctx).single_node().execute(blocking=False)
        return [submit(ctx, FILE), submit(ctx, OTHER_FILE), temporary]

    def body() -> Iterator[None]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            if state == "InProgress":
                emulator.add_fault("SubmitQuery", "query_hangs", times=3)
            submit_three(ctx)
            yield

    kill(body)
    if state == "Success":
        eventually(lambda: query_statuses(emulator) == ["Success"] * 3)
    with start_try(2, clear_number=1), use_cluster(CLUSTER, stop=False) as ctx:
        for query in submit_three(ctx):
            query.await_result()
    old = "Canceled" if state == "InProgress" else "Success"
    assert query_statuses(emulator) == [old] * 3 + ["Success"] * 3
    assert supervisor.variables == {}


def test_a_cleared_try_that_is_killed_is_resumed_as_any_other(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            yield hang(ctx)

    kill(body)
    second = kill(body, 2, clear_number=1)
    with start_try(3, clear_number=1), use_cluster(CLUSTER, stop=False) as ctx:
        third = hang(ctx)
        assert get_query_id(third) == get_query_id(second)
        detach(third)
    eventually(lambda: query_statuses(emulator) == ["Canceled", "InProgress"])


# Only the owner


def test_a_frozen_worker_cancels_nothing_and_stops_nothing_once_the_next_try_owns_its_queries(
    emulator: RunningEmulator, start_try: StartTry, caplog: pytest.LogCaptureFixture
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER) as ctx:
            yield submit(ctx)

    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    frozen = freeze(body)
    with start_try(2), use_cluster(CLUSTER) as ctx:
        query = submit(ctx)
        frozen.wake(AirflowTaskTimeout())
        assert "A later try of this task has adopted its queries" in caplog.text
        assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
        assert cluster_statuses(emulator) == ["Running"]
        emulator.advance_clock(timedelta(seconds=60))
        assert query.await_result().location == [FILE]
    assert query_statuses(emulator) == ["Success"]
    assert cluster_statuses(emulator) == ["Stopped"]


def test_a_frozen_worker_whose_block_ends_well_stops_nothing_either(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER) as ctx, suppress(KeyError):
            submit(ctx).await_result()
            yield

    frozen = freeze(body)
    with start_try(2), use_cluster(CLUSTER):
        frozen.wake(KeyError())
        assert cluster_statuses(emulator) == ["Idle"]
        assert len(entries(supervisor, "cluster")) == 1
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_frozen_worker_starts_nothing_more_once_the_next_try_owns_its_queries(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            submit(ctx).await_result()
            with suppress(KeyError):
                yield
            try:
                submit(ctx, OTHER_FILE)
            except Exception as error:
                errors.append(error)
                raise

    errors: list[Exception] = []
    frozen = freeze(body)
    with start_try(2), use_cluster(CLUSTER, stop=False):
        frozen.wake(KeyError())
        assert [type(error) for error in errors] == [TakenOverError]
        assert query_statuses(emulator) == ["Success"]
        assert len(entries(supervisor, "task")) == 1
    assert supervisor.variables == {}


def test_a_frozen_worker_is_noticed_although_the_next_try_has_submitted_nothing_yet(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            yield hang(ctx)

    frozen = freeze(body)
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        frozen.wake(AirflowTaskTimeout())
        assert query_statuses(emulator) == ["InProgress"]
        detach(hang(ctx))


def test_what_the_next_try_has_not_resumed_ends_with_it(
    hang: Hang, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            yield hang(ctx)

    kill(body)
    with start_try(2):
        pass  # its code no longer submits a query
    assert query_statuses(emulator) == ["Canceled"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("error", [None, KeyError])
def test_a_task_whose_record_was_deleted_ends_its_query_and_its_cluster_all_the_same(
    hang: Hang,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception] | None,
) -> None:
    with start_try(raises=error), use_cluster(CLUSTER) as ctx:
        query = hang(ctx) if error else submit(ctx)
        supervisor.variables.clear()
        if error:
            raise error
        assert query.await_result().location == [FILE]
    assert query_statuses(emulator) == ["Canceled" if error else "Success"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}
    assert "later try" not in caplog.text


def test_the_scope_ends_with_the_task(start_try: StartTry, emulator: RunningEmulator) -> None:
    with start_try():
        assert current_scope().session.conn_id == "polars_cloud"
    with pytest.raises(NotAuthenticatedError, match="put @authenticate below @task"):
        current_scope()
