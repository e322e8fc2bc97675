"""`include/queries.py`: a query is submitted once, and its end becomes the task's end."""

import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import polars as pl
import pytest
from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.exceptions import AirflowFailException, AirflowTaskTimeout
from airflow.sdk.execution_time.timeout import timeout as execution_timeout
from airflow.sdk.execution_time.xcom import XCom

from include.labels import get_labels
from include.queries import (
    QUERIES,
    SUBMISSIONS,
    cancel,
    connect,
    describe,
    find_status,
    leave,
    submit,
    wait_for,
)
from polars_cloud_emulator.testing import RunningEmulator
from tests.emulator.blocking_query import BlockingQuery
from tests.emulator.raw_calls import WORKSPACE, rest_client
from tests.tries import StartTry, Supervisor
from tests.waiting import eventually

FILE = "s3://your-bucket/results/two.parquet"
OTHER_FILE = "s3://your-bucket/results/other.parquet"
DIRECTORY = "s3://your-bucket/results/two/"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})

POLARS_ERRORS = [
    pl.exceptions.ColumnNotFoundError,
    pl.exceptions.ComputeError,
    pl.exceptions.DuplicateError,
    pl.exceptions.InvalidOperationError,
    pl.exceptions.NoDataError,
    pl.exceptions.OutOfBoundsError,
    pl.exceptions.PolarsError,
    pl.exceptions.SchemaError,
    pl.exceptions.SchemaFieldNotFoundError,
    pl.exceptions.ShapeError,
    pl.exceptions.SQLInterfaceError,
    pl.exceptions.SQLSyntaxError,
    pl.exceptions.StringCacheMismatchError,
    pl.exceptions.StructFieldNotFoundError,
]
BUILTIN_ERRORS = [FileNotFoundError, MemoryError, OSError, PermissionError, TypeError, ValueError]


@pytest.fixture
def ctx(pc: ModuleType) -> Any:
    """A cluster's context by its spec, which starts one each time that it is used anew."""
    return pc.ComputeContext(workspace="playground", cpus=2, memory=4)


@pytest.fixture
def remote(ctx: Any) -> Any:
    """A query that is ready to run on a cluster of one worker."""
    return TWO_ROWS.remote(ctx).single_node()


@pytest.fixture
def blocking(tmp_path: Path) -> BlockingQuery:
    return BlockingQuery(tmp_path)


def statuses(emulator: RunningEmulator) -> list[str]:
    return [query["status"] for query in emulator.state()["queries"]]


def clusters(emulator: RunningEmulator) -> list[str]:
    return [cluster["status"] for cluster in emulator.state()["clusters"]]


def calls(emulator: RunningEmulator, name: str) -> int:
    return sum(entry["path"].endswith(f"/{name}") for entry in emulator.journal())


# wait_for


@pytest.mark.usefixtures("ti")
def test_a_successful_query_gives_its_location_and_the_log_tells_id_rows_and_destination(
    remote: Any, caplog: pytest.LogCaptureFixture
) -> None:
    query = submit(remote, FILE)
    with caplog.at_level(logging.INFO, "include.queries"):
        location = wait_for(query)
    assert location == [FILE]
    assert pl.read_parquet(location).to_dict(as_series=False) == {"x": [1, 2]}
    assert f"Query {describe(query)} wrote 2 rows to ['{FILE}']" in caplog.text


@pytest.mark.usefixtures("ti")
def test_a_query_that_fails_on_its_data_raises_its_own_exception(
    ctx: Any, caplog: pytest.LogCaptureFixture
) -> None:
    query = submit(TWO_ROWS.select("y").remote(ctx).single_node(), FILE)
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="y"):
        wait_for(query)
    assert f"Query {describe(query)} failed" in caplog.text


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("error", POLARS_ERRORS + BUILTIN_ERRORS)
def test_each_type_of_error_comes_through(
    remote: Any, emulator: RunningEmulator, error: type[Exception]
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error=f"{error.__name__}: of row 7")
    query = submit(remote, FILE)
    with pytest.raises(error, match="of row 7") as raised:
        wait_for(query)
    assert raised.type is error


@pytest.mark.usefixtures("ti")
def test_an_error_of_an_unknown_type_comes_through_with_its_words(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="PanicException: of row 7")
    query = submit(remote, FILE)
    with pytest.raises(pl.exceptions.ComputeError, match="PanicException: of row 7"):
        wait_for(query)


@pytest.mark.usefixtures("ti")
def test_a_query_canceled_from_elsewhere_fails_the_task_for_good(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(remote, FILE)
    with rest_client(emulator.environment) as rest:
        rest.post(f"{WORKSPACE}/query/{query._query_id}/cancel").raise_for_status()
    with pytest.raises(AirflowFailException, match=f"{query._query_id} .* was canceled"):
        wait_for(query)


@pytest.mark.usefixtures("ti")
def test_a_result_without_a_location_fails_the_task(ctx: Any) -> None:
    query = TWO_ROWS.remote(ctx).sink_batches(lambda batch: False)
    with pytest.raises(RuntimeError, match="names no location"):
        wait_for(query)


@pytest.mark.usefixtures("ti")
def test_an_outage_while_waiting_is_survived(remote: Any, emulator: RunningEmulator) -> None:
    query = submit(remote, FILE)
    emulator.add_fault("GetQueryStatus", "grpc_error", code="UNAVAILABLE", message="down")
    emulator.add_fault("GetQueryResult", "connection_reset")
    assert wait_for(query) == [FILE]


@pytest.mark.usefixtures("ti", "short_outages")
def test_a_query_that_cannot_be_waited_for_is_canceled(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(remote, FILE)
    emulator.add_fault("GetQueryStatus", "grpc_error", code="NOT_FOUND", message="for good")
    with pytest.raises(RuntimeError, match="for good"):
        wait_for(query)
    assert statuses(emulator) == ["Canceled"]


@pytest.mark.usefixtures("ti")
def test_a_time_out_cancels_the_query(remote: Any, emulator: RunningEmulator) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(remote, FILE)
    with pytest.raises(AirflowTaskTimeout), execution_timeout(0.5):
        wait_for(query)
    assert statuses(emulator) == ["Canceled"]


def test_a_kill_cancels_the_query(remote: Any, emulator: RunningEmulator, ti: Any) -> None:
    def kill() -> None:
        eventually(lambda: calls(emulator, "GetQueryStatus"))
        os.kill(os.getpid(), signal.SIGTERM)

    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(remote, FILE)
    # As Airflow's own handler does.
    before = signal.signal(signal.SIGTERM, lambda *_: ti.task.on_kill())
    try:
        with ThreadPoolExecutor() as background:
            background.submit(kill)
            with pytest.raises(SystemExit) as raised:
                wait_for(query)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert raised.value.code == 143
    assert statuses(emulator) == ["Canceled"]


# submit


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_has_stopped_in_the_meantime_is_started_again(
    ctx: Any, pc: ModuleType, emulator: RunningEmulator
) -> None:
    ctx.start()
    pc.ComputeContext.connect(ctx._compute_id, workspace="playground").stop()
    assert wait_for(submit(TWO_ROWS.remote(ctx).single_node(), FILE)) == [FILE]
    assert clusters(emulator) == ["Stopped", "Idle"]


@pytest.mark.usefixtures("ti")
def test_a_query_carries_the_tasks_labels_beside_the_users_own(
    ctx: Any, emulator: RunningEmulator
) -> None:
    leave(submit(TWO_ROWS.remote(ctx).labels(["finance", "daily"]).single_node(), FILE))
    [query] = emulator.state()["queries"]
    assert query["labels"] == ["finance", "daily", *get_labels()]


@pytest.mark.usefixtures("ti")
def test_sink_options_are_passed_on(ctx: Any) -> None:
    # A distributed query writes one file only if it is told to.
    query = submit(TWO_ROWS.remote(ctx), FILE, sink_to_single_file=True)
    assert wait_for(query) == [FILE]


def test_the_querys_id_is_an_xcom(remote: Any, ti: Any) -> None:
    query = submit(remote, FILE)
    place = {"dag_id": ti.dag_id, "task_id": ti.task_id, "run_id": ti.run_id}
    [[pushed]] = XCom.get_all(key=QUERIES, **place)
    assert pushed["query_id"] == str(query._query_id)


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("uri", [FILE, DIRECTORY])
def test_a_submission_whose_answer_is_lost_is_found_again(
    remote: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture, uri: str
) -> None:
    emulator.add_fault("SubmitQuery", "answer_lost")
    with caplog.at_level(logging.INFO, "include.queries"):
        query = submit(remote, uri)
    assert "The submission had been taken without an answer" in caplog.text
    assert pl.read_parquet(wait_for(query)).height == 2
    assert statuses(emulator) == ["Success"]


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "connection_reset"},
        {"kind": "grpc_error", "code": "UNAVAILABLE", "message": "down"},
    ],
)
def test_a_submission_that_was_not_taken_is_repeated(
    remote: Any, emulator: RunningEmulator, fault: dict[str, str]
) -> None:
    emulator.add_fault("SubmitQuery", **fault)
    assert wait_for(submit(remote, FILE)) == [FILE]
    assert statuses(emulator) == ["Success"]


@pytest.mark.usefixtures("ti")
def test_a_repeated_submission_is_not_mistaken_for_an_earlier_one(
    ctx: Any, emulator: RunningEmulator
) -> None:
    wait_for(submit(TWO_ROWS.remote(ctx).single_node(), FILE))
    emulator.add_fault("SubmitQuery", "connection_reset")
    wait_for(submit(TWO_ROWS.head(1).remote(ctx).single_node(), FILE))
    assert statuses(emulator) == ["Success", "Success"]
    assert pl.read_parquet(FILE).height == 1


@pytest.mark.usefixtures("ti")
def test_a_submission_that_is_refused_is_an_error_and_runs_nowhere(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "grpc_error", code="PERMISSION_DENIED", message="for good")
    with pytest.raises(RuntimeError, match="for good"):
        submit(remote, FILE)
    assert calls(emulator, "SubmitQuery") == 1
    assert statuses(emulator) == []


@pytest.mark.usefixtures("ti")
def test_a_submission_that_is_given_up_after_it_was_taken_is_canceled(
    ctx: Any, emulator: RunningEmulator, blocking: BlockingQuery
) -> None:
    emulator.add_fault("SubmitQuery", "answer_lost")
    emulator.add_fault("GET query", "http_error", status=403, message="for good")
    with pytest.raises(ValueError, match="for good"):
        submit(blocking.lazy_frame().remote(ctx).single_node(), FILE)
    assert statuses(emulator) == ["Canceled"]


@pytest.mark.usefixtures("ti")
def test_a_query_whose_id_cannot_be_kept_is_canceled(
    remote: Any, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Airflow is out of order")

    monkeypatch.setattr(BaseXCom, "set", refuse)
    emulator.add_fault("SubmitQuery", "query_hangs")
    with pytest.raises(ConnectionError, match="Airflow is out of order"):
        submit(remote, FILE)
    assert statuses(emulator) == ["Canceled"]


def test_each_try_writes_a_directory_of_its_own(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    locations = []
    for try_number in (1, 2):
        ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
        with start_try(try_number) as ti:
            [location] = wait_for(submit(TWO_ROWS.remote(ctx), DIRECTORY))
        assert location.startswith(f"{DIRECTORY}{ti.id}/")
        locations.append(location)
    assert len(set(locations)) == 2
    assert pl.read_parquet(locations).height == 4


# The next try


def test_a_next_try_goes_on_with_a_query_that_is_running(
    ctx: Any, emulator: RunningEmulator, start_try: StartTry, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try(1):
        first = submit(TWO_ROWS.remote(ctx).single_node(), FILE)
    with start_try(2), caplog.at_level(logging.INFO, "include.queries"):
        second = submit(TWO_ROWS.remote(ctx).single_node(), FILE)
    assert second._query_id == first._query_id
    assert f"Going on with query {describe(first)} of an earlier try" in caplog.text
    assert statuses(emulator) == ["InProgress"]


@pytest.mark.parametrize("uri", [FILE, DIRECTORY])
def test_a_next_try_goes_on_with_a_query_that_has_succeeded(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, uri: str
) -> None:
    def remote() -> Any:
        ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
        return TWO_ROWS.remote(ctx).single_node()

    with start_try(1):
        first = submit(remote(), uri)
    eventually(lambda: statuses(emulator) == ["Success"])
    with start_try(2):
        location = wait_for(submit(remote(), uri))
    assert location == first.await_result().location
    assert pl.read_parquet(location).height == 2
    assert statuses(emulator) == ["Success"]
    assert clusters(emulator) == ["Idle"]


def test_a_next_try_finds_a_query_whose_id_the_first_had_no_time_to_keep(
    ctx: Any, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "delay", seconds=60)
    with start_try(1), ThreadPoolExecutor() as background:
        submitting = background.submit(submit, TWO_ROWS.remote(ctx).single_node(), FILE)
        eventually(lambda: calls(emulator, "SubmitQuery"))
        kept_so_far = dict(supervisor.store)
        emulator.clear_faults()  # which ends the delay
        first = submitting.result()
    supervisor.store = kept_so_far
    with start_try(2):
        second = submit(TWO_ROWS.remote(ctx).single_node(), FILE)
    assert second._query_id == first._query_id


@pytest.mark.parametrize("end", ["failed", "canceled"])
def test_a_next_try_submits_a_query_anew_that_will_never_succeed(
    ctx: Any, emulator: RunningEmulator, start_try: StartTry, end: str
) -> None:
    if end == "failed":
        emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
    else:
        emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try(1):
        first = submit(TWO_ROWS.remote(ctx).single_node(), FILE)
        if end == "canceled":
            cancel(first)
    eventually(lambda: statuses(emulator) == [end.title()])
    with start_try(2):
        assert wait_for(submit(TWO_ROWS.remote(ctx).single_node(), FILE)) == [FILE]
    assert statuses(emulator) == [end.title(), "Success"]


def test_a_next_try_after_a_failure_uses_the_cluster_that_the_first_has_started(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
    for try_number, end in ((1, "Failed"), (2, "Success")):
        ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
        with start_try(try_number):
            submit(TWO_ROWS.remote(ctx).single_node(), FILE)
        eventually(lambda end=end: statuses(emulator)[-1] == end)
    assert clusters(emulator) == ["Idle"]


def test_a_next_try_starts_a_cluster_when_that_of_the_first_has_stopped(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(1):
        ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
        submit(TWO_ROWS.remote(ctx).single_node(), FILE)
        ctx.stop()
    with start_try(2):
        ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
        assert wait_for(submit(TWO_ROWS.remote(ctx).single_node(), FILE)) == [FILE]
    assert clusters(emulator) == ["Stopped", "Idle"]


@pytest.mark.parametrize("end", [wait_for, leave])
def test_a_task_that_is_cleared_when_it_was_through_submits_anew(
    ctx: Any, emulator: RunningEmulator, start_try: StartTry, end: Any
) -> None:
    for try_number in (1, 2):
        with start_try(try_number):
            end(submit(TWO_ROWS.remote(ctx).single_node(), FILE))
    eventually(lambda: statuses(emulator) == ["Success", "Success"])


# leave, cancel and those that look


@pytest.mark.usefixtures("ti")
def test_a_query_that_is_left_runs_on(remote: Any, emulator: RunningEmulator) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query_id = leave(submit(remote, FILE))
    [query] = emulator.state()["queries"]
    assert (query["id"], query["cancels"]) == (query_id, 0)
    assert not query["ended_at"]


@pytest.mark.usefixtures("ti")
def test_a_canceled_query_has_ended(
    remote: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(remote, FILE)
    with caplog.at_level(logging.INFO, "include.queries"):
        cancel(query)
    assert statuses(emulator) == ["Canceled"]
    assert f"Canceled query {describe(query)}" in caplog.text


@pytest.mark.usefixtures("ti")
def test_a_cancel_that_was_not_heard_is_repeated(remote: Any, emulator: RunningEmulator) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(remote, FILE)
    emulator.add_fault("CancelQuery", "connection_reset")
    cancel(query)
    assert statuses(emulator) == ["Canceled"]


@pytest.mark.usefixtures("ti")
def test_a_cancel_that_fails_is_logged_and_not_raised(
    remote: Any,
    emulator: RunningEmulator,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("include.queries.GRACE", 0.5)
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(remote, FILE)
    emulator.add_fault("CancelQuery", "connection_reset", times=1_000)
    cancel(query)
    assert f"Query {describe(query)} could not be canceled" in caplog.text


@pytest.mark.usefixtures("ti")
def test_a_query_is_described_by_its_id_and_its_page(
    remote: Any, emulator: RunningEmulator
) -> None:
    query = submit(remote, FILE)
    [cluster] = emulator.state()["clusters"]
    page = f"portal/{WORKSPACE.rpartition('/')[2]}/{cluster['id']}/queries/{query._query_id}"
    assert describe(query).startswith(f"{query._query_id} (https://")
    assert describe(query).endswith(f"/{page})")


@pytest.mark.usefixtures("ti")
def test_a_query_is_taken_up_by_its_id(pc: ModuleType, remote: Any) -> None:
    query = submit(remote, FILE)
    elsewhere = pc.ComputeContext.connect(remote.context._compute_id, workspace="playground")
    assert wait_for(connect(str(query._query_id), elsewhere)) == [FILE]


def test_a_query_that_its_cluster_does_not_know_has_no_status(ctx: Any) -> None:
    ctx.start()
    assert find_status(connect(str(uuid4()), ctx)) is None


@pytest.mark.usefixtures("ti")
def test_a_status_that_is_refused_is_an_error(remote: Any, emulator: RunningEmulator) -> None:
    query = submit(remote, FILE)
    emulator.add_fault("GetQueryStatus", "grpc_error", code="PERMISSION_DENIED", message="no")
    with pytest.raises(RuntimeError, match="no"):
        find_status(query)


@pytest.mark.usefixtures("ti")
def test_two_queries_of_a_task_at_once_are_two(ctx: Any) -> None:
    first = submit(TWO_ROWS.remote(ctx).single_node(), FILE)
    second = submit(TWO_ROWS.head(1).remote(ctx).single_node(), OTHER_FILE)
    assert [wait_for(first), wait_for(second)] == [[FILE], [OTHER_FILE]]


def test_a_next_try_does_not_take_the_second_query_of_the_task_for_its_first(
    ctx: Any, start_try: StartTry
) -> None:
    with start_try(1):
        wait_for(submit(TWO_ROWS.remote(ctx).single_node(), FILE))
        submit(TWO_ROWS.head(1).remote(ctx).single_node(), OTHER_FILE)
    with start_try(2):
        assert wait_for(submit(TWO_ROWS.remote(ctx).single_node(), FILE)) == [FILE]


def test_a_query_whose_destination_merely_begins_alike_is_not_taken_for_the_lost_one(
    ctx: Any, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    with start_try(1):
        ours = submit(TWO_ROWS.remote(ctx).single_node(), "s3://your-bucket/results/sales")
    # Another task's, on the same cluster, at the same time.
    TWO_ROWS.remote(ctx).single_node().sink_parquet("s3://your-bucket/results/sales_by_day")
    [submission] = supervisor.store[SUBMISSIONS].values()
    del submission["query_id"]
    with start_try(2):
        again = submit(TWO_ROWS.remote(ctx).single_node(), "s3://your-bucket/results/sales")
    assert again._query_id == ours._query_id


@pytest.mark.usefixtures("ti")
def test_a_query_that_is_submitted_twice_carries_its_labels_once(
    ctx: Any, emulator: RunningEmulator
) -> None:
    remote = TWO_ROWS.remote(ctx).single_node()
    for _ in range(2):
        wait_for(submit(remote, FILE))
    assert [len(query["labels"]) for query in emulator.state()["queries"]] == [4, 4]


@pytest.mark.usefixtures("ti")
def test_proxy_mode_is_refused_before_a_query_runs(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4, connection_mode="proxy")
    emulator.add_fault("SubmitQuery", "query_hangs")
    with pytest.raises(Exception, match="proxy"):
        submit(TWO_ROWS.remote(ctx).single_node(), FILE)
    assert statuses(emulator) == []
