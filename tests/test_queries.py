"""`queries.py`: a query is submitted once, and its end becomes the task's end."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import ModuleType
from typing import Any

import boto3
import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowFailException

from include.polars_remote.client_internals import connect_query, get_cluster_id, get_query_id
from include.polars_remote.clusters import compute_context
from include.polars_remote.labels import get_labels
from include.polars_remote.queries import METHODS, leave, run_query, submit, wait_for
from include.polars_remote.recorded_queries import describe
from polars_cloud_emulator.testing import RunningEmulator, eventually
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, kill

FILE = "s3://your-bucket/results/two.parquet"
OTHER_FILE = "s3://your-bucket/results/other.parquet"
DIRECTORY = "s3://your-bucket/results/two/"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})
ONE_ROW = TWO_ROWS.head(1)
CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}
YEAR = 365 * 24 * 60

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


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    """The log tells what it tells in Airflow."""
    caplog.set_level("INFO", "include")


@pytest.fixture
def new_ctx(pc: ModuleType) -> Callable[[], Any]:
    """A context of the same cluster each time, as each try makes one."""
    return lambda: compute_context(CLUSTER)


@pytest.fixture
def ctx(new_ctx: Callable[[], Any]) -> Any:
    return new_ctx()


@pytest.fixture
def remote(ctx: Any) -> Any:
    """A query that is ready to run on a cluster of one worker."""
    return TWO_ROWS.remote(ctx).single_node()


# wait_for


@pytest.mark.usefixtures("ti")
def test_a_successful_query_gives_its_location_and_the_log_tells_id_rows_and_destination(
    remote: Any, caplog: pytest.LogCaptureFixture
) -> None:
    query = submit(remote.sink_parquet, FILE)
    result = wait_for(query)
    assert (result.location, result.n_rows_total) == ([FILE], 2)
    assert pl.read_parquet(FILE).to_dict(as_series=False) == {"x": [1, 2]}
    assert f"Submitted query {describe(query)}" in caplog.text
    assert f"Query {get_query_id(query)} wrote 2 rows to {FILE} in " in caplog.text


@pytest.mark.usefixtures("ti")
def test_a_query_that_fails_on_its_data_raises_its_own_exception(
    ctx: Any, caplog: pytest.LogCaptureFixture
) -> None:
    query = submit(TWO_ROWS.select("y").remote(ctx).single_node().sink_parquet, FILE)
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="y"):
        wait_for(query)
    assert f"Query {describe(query)} failed" in caplog.text


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("error", POLARS_ERRORS + BUILTIN_ERRORS)
def test_each_type_of_error_comes_through(
    remote: Any, emulator: RunningEmulator, error: type[Exception]
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error=f"{error.__name__}: of row 7")
    with pytest.raises(error, match="of row 7") as raised:
        run_query(remote.sink_parquet, FILE)
    assert raised.type is error


@pytest.mark.usefixtures("ti")
def test_an_error_of_an_unknown_type_comes_through_with_its_words(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="PanicException: of row 7")
    with pytest.raises(pl.exceptions.ComputeError, match="PanicException: of row 7"):
        run_query(remote.sink_parquet, FILE)


@pytest.mark.usefixtures("ti")
def test_a_query_canceled_from_elsewhere_fails_the_task_for_good(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(remote.sink_parquet, FILE)
    query_id = get_query_id(query)
    emulator.call("POST", f"query/{query_id}/cancel")
    with pytest.raises(AirflowFailException, match=f"{query_id} .* was canceled"):
        wait_for(query)


@pytest.mark.usefixtures("ti")
def test_a_result_without_a_location_fails_the_task(ctx: Any) -> None:
    query = TWO_ROWS.remote(ctx).sink_batches(lambda batch: False)
    with pytest.raises(RuntimeError, match="names no location"):
        wait_for(query)


@pytest.mark.usefixtures("ti")
def test_an_outage_while_waiting_is_survived(remote: Any, emulator: RunningEmulator) -> None:
    query = submit(remote.sink_parquet, FILE)
    emulator.add_fault("GetQueryStatus", "grpc_error", code="UNAVAILABLE", message="down")
    emulator.add_fault("GetQueryResult", "connection_reset")
    assert wait_for(query).location == [FILE]


@pytest.mark.usefixtures("ti")
def test_a_query_is_taken_up_by_its_id(remote: Any, new_ctx: Callable[[], Any]) -> None:
    query = submit(remote.sink_parquet, FILE)
    elsewhere = connect_query(get_query_id(query), new_ctx())
    assert wait_for(elsewhere).location == [FILE]


# What can be submitted


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("scaling", ["single_node", "distributed"])
@pytest.mark.parametrize(
    ("method", "scan"),
    [
        ("sink_csv", pl.scan_csv),
        ("sink_ipc", pl.scan_ipc),
        ("sink_parquet", pl.scan_parquet),
    ],
)
def test_each_sink_writes_its_format(
    ctx: Any, emulator: RunningEmulator, method: str, scan: Any, scaling: str
) -> None:
    remote = getattr(TWO_ROWS.remote(ctx), scaling)()
    result = run_query(getattr(remote, method), DIRECTORY)
    assert scan(result.location).collect().to_dict(as_series=False) == {"x": [1, 2]}
    [query] = emulator.state()["queries"]
    assert query["mode"] == scaling


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("scaling", ["single_node", "distributed"])
def test_a_temporary_result_is_handed_on_by_its_location(
    ctx: Any, emulator: RunningEmulator, scaling: str
) -> None:
    first = run_query(getattr(TWO_ROWS.remote(ctx), scaling)().execute)
    second = run_query(pl.scan_parquet(first.location).sum().remote(ctx).execute)
    assert pl.read_parquet(second.location).to_dict(as_series=False) == {"x": [3]}
    assert [query["mode"] for query in emulator.state()["queries"]] == [scaling, "distributed"]


@pytest.mark.usefixtures("ti")
def test_a_partitioned_sink_writes_a_directory_per_key(ctx: Any) -> None:
    target = pl.PartitionBy(DIRECTORY, key="x")
    result = run_query(TWO_ROWS.remote(ctx).single_node().sink_parquet, target)
    assert result.n_rows_total == 2
    assert pl.read_parquet(f"{DIRECTORY}x=2/", hive_partitioning=True)["x"].to_list() == [2]


@pytest.mark.usefixtures("ti")
def test_the_destination_may_be_named(remote: Any) -> None:
    assert run_query(remote.sink_parquet, uri=FILE).location == [FILE]


@pytest.mark.usefixtures("ti")
def test_sink_options_are_passed_on(ctx: Any) -> None:
    # A distributed query writes one file only if it is told to.
    result = run_query(TWO_ROWS.remote(ctx).sink_parquet, FILE, sink_to_single_file=True)
    assert result.location == [FILE]


@pytest.mark.usefixtures("ti")
def test_a_query_keeps_its_priority(ctx: Any, emulator: RunningEmulator) -> None:
    remote: Any = TWO_ROWS.remote(ctx, priority=7)  # type: ignore[call-arg]  # polars_cloud's own
    run_query(remote.single_node().sink_parquet, FILE)
    [query] = emulator.state()["queries"]
    assert query["priority"] == 7


@pytest.mark.usefixtures("ti")
def test_a_query_carries_the_tasks_labels_beside_the_users_own(
    ctx: Any, emulator: RunningEmulator
) -> None:
    run_query(TWO_ROWS.remote(ctx).labels(["finance", "daily"]).single_node().sink_parquet, FILE)
    [query] = emulator.state()["queries"]
    assert query["labels"] == ["finance", "daily", *get_labels()]


@pytest.mark.usefixtures("ti")
def test_a_query_that_is_submitted_twice_carries_its_labels_once(
    remote: Any, emulator: RunningEmulator
) -> None:
    for uri in (FILE, OTHER_FILE):
        run_query(remote.sink_parquet, uri)
    assert [len(query["labels"]) for query in emulator.state()["queries"]] == [4, 4]


@pytest.mark.usefixtures("ti")
def test_two_queries_of_a_task_at_once_are_two(remote: Any, ctx: Any) -> None:
    first = submit(remote.sink_parquet, FILE)
    second = submit(ONE_ROW.remote(ctx).single_node().sink_parquet, OTHER_FILE)
    assert [wait_for(first).location, wait_for(second).location] == [[FILE], [OTHER_FILE]]


@pytest.mark.usefixtures("ti")
def test_two_temporary_results_of_one_query_are_two(remote: Any, emulator: RunningEmulator) -> None:
    first, second = submit(remote.execute), submit(remote.execute)
    assert wait_for(first).location != wait_for(second).location
    assert query_statuses(emulator) == ["Success", "Success"]


# What is refused


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("waits", [True, False])
def test_two_queries_for_one_destination_are_an_error_before_the_second_is_sent(
    remote: Any, ctx: Any, emulator: RunningEmulator, waits: bool
) -> None:
    first = submit(remote.sink_parquet, FILE)
    if waits:
        wait_for(first)
    with pytest.raises(ValueError, match="write to") as raised:
        submit(ONE_ROW.remote(ctx).single_node().sink_csv, FILE)
    assert FILE in str(raised.value)
    assert f"the one with id {get_query_id(first)} and the one that was" in str(raised.value)
    assert calls(emulator, "SubmitQuery") == 1


@pytest.mark.usefixtures("ti")
def test_two_queries_for_one_partitioned_destination_are_an_error(remote: Any) -> None:
    submit(remote.sink_parquet, pl.PartitionBy(DIRECTORY, key="x"))
    with pytest.raises(ValueError, match=f"write to {DIRECTORY}"):
        submit(remote.sink_csv, pl.PartitionBy(DIRECTORY, max_rows_per_file=1))


@pytest.mark.usefixtures("ti")
def test_a_sink_that_was_called_is_an_error_and_its_query_is_canceled(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with pytest.raises(TypeError, match=r"the method itself, as in submit\(remote\.sink_parquet"):
        submit(remote.sink_parquet(FILE))
    assert query_statuses(emulator) == ["Canceled"]


@pytest.mark.usefixtures("ti")
def test_what_is_no_method_of_a_remote_query_is_an_error(remote: Any) -> None:
    for other in (remote, remote.execute(), remote.show, TWO_ROWS.sink_parquet, print):
        with pytest.raises(TypeError, match=r"submit takes execute, .* of a remote query, not"):
            submit(other)


@pytest.mark.usefixtures("ti")
def test_a_context_without_a_name_is_refused_before_anything_is_sent(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    with pytest.raises(ValueError, match=r"no name .* use_cluster or compute_context"):
        submit(TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE)
    assert cluster_statuses(emulator) == query_statuses(emulator) == []


@pytest.mark.usefixtures("ti")
def test_proxy_mode_is_refused_before_a_query_runs(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4, connection_mode="proxy")
    with pytest.raises(ValueError, match="not proxy"):
        submit(TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE)
    assert cluster_statuses(emulator) == query_statuses(emulator) == []


def test_each_method_that_is_named_is_one_of_the_clients(pc: ModuleType) -> None:
    assert [name for name in METHODS if not hasattr(pc.LazyFrameRemote, name)] == []


def test_a_query_outside_of_authenticate_is_refused_before_anything_is_sent(
    remote: Any, emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(scope=False), pytest.raises(RuntimeError, match="Put @authenticate below @task"):
        submit(remote.sink_parquet, FILE)
    assert query_statuses(emulator) == []


# The cluster


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_has_stopped_in_the_meantime_is_started_again(
    ctx: Any, pc: ModuleType, emulator: RunningEmulator
) -> None:
    ctx.start()
    pc.ComputeContext.connect(get_cluster_id(ctx), workspace="playground").stop()
    assert run_query(TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE).location == [FILE]
    assert cluster_statuses(emulator) == ["Stopped", "Idle"]


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_stops_just_before_the_submission_is_started_again(
    ctx: Any, pc: ModuleType, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    ctx.start()
    run_query(TWO_ROWS.remote(ctx).single_node().sink_parquet, OTHER_FILE)  # connects
    emulator.add_fault("SubmitQuery", "delay", seconds=60)
    with ThreadPoolExecutor() as background:
        running = background.submit(
            run_query, TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE
        )
        eventually(lambda: calls(emulator, "SubmitQuery") == 2)
        pc.ComputeContext.connect(get_cluster_id(ctx), workspace="playground").stop()
        emulator.clear_faults()  # which ends the delay
        assert running.result().location == [FILE]
    assert cluster_statuses(emulator) == ["Stopped", "Idle"]
    assert "has stopped: starting it again" in caplog.text


# The reply


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("uri", [FILE, DIRECTORY])
def test_a_submission_whose_reply_is_lost_is_found_again(
    remote: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture, uri: str
) -> None:
    emulator.add_fault("SubmitQuery", "answer_lost")
    query = submit(remote.sink_parquet, uri)
    assert "The query had been accepted although the reply was lost" in caplog.text
    assert pl.read_parquet(wait_for(query).location).height == 2
    assert query_statuses(emulator) == ["Success"]


@pytest.mark.usefixtures("ti")
def test_a_partitioned_submission_whose_reply_is_lost_is_found_again(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "answer_lost")
    run_query(remote.sink_parquet, pl.PartitionBy(DIRECTORY, key="x"))
    assert query_statuses(emulator) == ["Success"]


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "connection_reset"},
        {"kind": "grpc_error", "code": "UNAVAILABLE", "message": "down"},
    ],
    ids=["reset", "unavailable"],
)
def test_a_submission_that_was_not_accepted_is_repeated(
    remote: Any, emulator: RunningEmulator, fault: dict[str, str]
) -> None:
    emulator.add_fault("SubmitQuery", **fault)
    assert run_query(remote.sink_parquet, FILE).location == [FILE]
    assert query_statuses(emulator) == ["Success"]


@pytest.mark.parametrize("kind", ["answer_lost", "connection_reset"])
def test_yesterdays_query_is_never_taken_for_the_one_whose_reply_was_lost(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, kind: str
) -> None:
    cluster = {**CLUSTER, "idle_timeout_mins": YEAR}
    with start_try(run_id="yesterday"):
        ctx = compute_context(cluster)
        run_query(TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE)
    # From here on Polars Cloud's clock and the worker's differ by a day.
    emulator.advance_clock(timedelta(days=1))
    with start_try(run_id="today"):
        ctx = compute_context(cluster)
        emulator.add_fault("SubmitQuery", kind)
        run_query(ONE_ROW.remote(ctx).single_node().sink_parquet, FILE)
    assert pl.read_parquet(FILE).height == 1
    assert query_statuses(emulator) == ["Success", "Success"]
    assert cluster_statuses(emulator) == ["Idle"]


@pytest.mark.usefixtures("ti")
def test_a_query_whose_destination_merely_begins_alike_is_not_taken_for_the_lost_one(
    ctx: Any, emulator: RunningEmulator
) -> None:
    sales, by_day = "s3://your-bucket/results/sales", "s3://your-bucket/results/sales_by_day"

    def submit_another_tasks() -> None:
        eventually(lambda: calls(emulator, "SubmitQuery"))
        TWO_ROWS.remote(ctx).single_node().sink_parquet(by_day)
        emulator.clear_faults()  # the connection of the first is reset

    ctx.start()
    emulator.add_fault("SubmitQuery", "stall")
    with ThreadPoolExecutor() as background:
        background.submit(submit_another_tasks)
        ours = submit(ONE_ROW.remote(ctx).single_node().sink_parquet, sales)
    assert len(query_statuses(emulator)) == 2
    assert pl.read_parquet(wait_for(ours).location).height == 1


@pytest.mark.usefixtures("ti")
def test_a_temporary_result_whose_reply_is_lost_is_asked_for_again(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "answer_lost")
    [location] = run_query(remote.execute).location
    eventually(lambda: query_statuses(emulator) == ["Success", "Success"])
    lost, ours = emulator.state()["queries"]
    assert location in ours["destinations"]
    assert location not in lost["destinations"]


@pytest.mark.usefixtures("ti")
def test_a_temporary_result_whose_reply_is_lost_is_never_mistaken_for_anothers(
    ctx: Any, remote: Any, emulator: RunningEmulator
) -> None:
    others = TWO_ROWS.with_columns(x=7).remote(ctx).single_node().execute(blocking=False)
    others.await_result()
    emulator.add_fault("SubmitQuery", "connection_reset")
    assert pl.read_parquet(run_query(remote.execute).location)["x"].to_list() == [1, 2]


@pytest.mark.usefixtures("ti")
def test_a_submission_that_is_refused_is_an_error_and_runs_nowhere(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "grpc_error", code="PERMISSION_DENIED", message="for good")
    with pytest.raises(RuntimeError, match="for good"):
        submit(remote.sink_parquet, FILE)
    assert calls(emulator, "SubmitQuery") == 1
    assert query_statuses(emulator) == []


def test_a_submission_that_is_given_up_after_it_was_accepted_is_canceled(
    ctx: Any, emulator: RunningEmulator, start_try: StartTry
) -> None:
    def take_long(df: pl.DataFrame) -> pl.DataFrame:
        time.sleep(600)
        return df

    with start_try(raises=ValueError, match="for good"):
        emulator.add_fault("SubmitQuery", "answer_lost")
        emulator.add_fault("GET query", "http_error", nth=2, status=403, message="for good")
        submit(ONE_ROW.map_batches(take_long).remote(ctx).single_node().sink_parquet, FILE)
    assert query_statuses(emulator) == ["Canceled"]


# An expired result


def delete_results() -> None:
    s3: Any = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    bucket = "polars-cloud-temporary"
    for stored in s3.list_objects_v2(Bucket=bucket)["Contents"]:
        s3.delete_object(Bucket=bucket, Key=stored["Key"])
    s3.close()


@pytest.mark.parametrize("upstream", ["clean_sales", None])
def test_a_temporary_result_that_has_expired_names_the_task_to_clear(
    new_ctx: Callable[[], Any], start_try: StartTry, upstream: str | None
) -> None:
    with start_try(task_id="clean_sales"):
        location = run_query(TWO_ROWS.remote(new_ctx()).execute).location
    delete_results()
    with start_try(task_id="sum_days", upstream=upstream):
        remote = pl.scan_parquet(location).remote(new_ctx())
        with pytest.raises(FileNotFoundError) as raised:
            run_query(remote.single_node().sink_parquet, FILE)
    notes = getattr(raised.value, "__notes__", [])
    assert any("it has expired: clear clean_sales" in note for note in notes) is bool(upstream)


# The next try


def test_the_next_try_of_a_killed_worker_resumes_the_running_query(
    new_ctx: Callable[[], Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def body() -> Iterator[Any]:
        emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
        yield submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)

    first = kill(body)
    with start_try(2):
        second = submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)
        assert get_query_id(second) == get_query_id(first)
        assert f"Resuming query {describe(first)}, submitted by try 1" in caplog.text
        emulator.advance_clock(timedelta(seconds=60))
        assert wait_for(second).location == [FILE]
    assert query_statuses(emulator) == ["Success"]


@pytest.mark.parametrize("uri", [FILE, DIRECTORY])
def test_the_next_try_of_a_killed_worker_takes_the_result_of_a_query_that_has_succeeded(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry, uri: str
) -> None:
    def body() -> Iterator[Any]:
        yield submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, uri)

    first = kill(body)
    eventually(lambda: query_statuses(emulator) == ["Success"])
    with start_try(2):
        location = run_query(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, uri).location
    assert location == first.await_result().location
    assert pl.read_parquet(location).height == 2
    assert query_statuses(emulator) == ["Success"]
    assert cluster_statuses(emulator) == ["Idle"]


@pytest.mark.usefixtures("pc")
def test_the_next_try_of_a_killed_worker_resumes_all_its_queries(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    def submit_all() -> list[Any]:
        ctx = compute_context({**CLUSTER, "cluster_size": 5})
        two, one = TWO_ROWS.remote(ctx).single_node(), ONE_ROW.remote(ctx).single_node()
        return [
            submit(two.sink_parquet, FILE),
            submit(one.sink_csv, OTHER_FILE),
            submit(two.execute),
            submit(two.execute),
            submit(one.execute),
        ]

    def body() -> Iterator[Any]:
        emulator.add_fault("SubmitQuery", "query_takes", seconds=60, times=5)
        yield submit_all()

    first = kill(body)
    with start_try(2):
        second = submit_all()
        assert [get_query_id(query) for query in second] == [get_query_id(query) for query in first]
        emulator.advance_clock(timedelta(seconds=60))
        assert [wait_for(query).n_rows_total for query in second] == [2, 1, 2, 2, 1]
    assert query_statuses(emulator) == ["Success"] * 5


def test_the_next_try_resumes_what_an_earlier_try_had_resumed_itself(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[Any]:
        yield submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)

    emulator.add_fault("SubmitQuery", "query_hangs")
    first, second = kill(body), kill(body, 2)
    with start_try(3):
        third = submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)
        assert get_query_id(first) == get_query_id(second) == get_query_id(third)
        leave(third)


def test_the_next_try_finds_a_query_whose_id_the_first_had_no_time_to_record(
    new_ctx: Callable[[], Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
) -> None:
    def submit_sink() -> Any:
        return submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)

    def body() -> Iterator[Any]:
        with ThreadPoolExecutor() as background:
            submitting = background.submit(submit_sink)
            eventually(lambda: calls(emulator, "SubmitQuery"))
            recorded_so_far = dict(supervisor.variables)
            emulator.clear_faults()  # which ends the delay
            query = submitting.result()
        supervisor.variables = recorded_so_far
        yield query

    emulator.add_fault("SubmitQuery", "delay", seconds=60)
    first = kill(body)
    assert "query_id" not in entries(supervisor, "task")[0]["queries"][FILE]
    with start_try(2):
        second = submit_sink()
        assert get_query_id(second) == get_query_id(first)
        wait_for(second)


@pytest.mark.parametrize("end", ["failed", "canceled"])
def test_the_next_try_submits_a_query_anew_that_will_never_succeed(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry, end: str
) -> None:
    def body() -> Iterator[Any]:
        if end == "failed":
            emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
        else:
            emulator.add_fault("SubmitQuery", "query_hangs")
        yield submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)

    first = kill(body)
    if end == "canceled":
        first.cancel()
    eventually(lambda: query_statuses(emulator) == [end.title()])
    with start_try(2):
        remote = TWO_ROWS.remote(new_ctx()).single_node()
        assert run_query(remote.sink_parquet, FILE).location == [FILE]
    assert query_statuses(emulator) == [end.title(), "Success"]


def test_the_next_try_after_a_failure_uses_the_cluster_that_the_first_has_started(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
    with start_try(raises=pl.exceptions.SchemaError):
        run_query(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)
    with start_try(2):
        run_query(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)
    assert query_statuses(emulator) == ["Failed", "Success"]
    assert cluster_statuses(emulator) == ["Idle"]


def test_the_next_try_starts_a_cluster_when_that_of_the_first_has_stopped(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[None]:
        ctx = new_ctx()
        emulator.add_fault("SubmitQuery", "query_hangs")
        submit(TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE)
        ctx.stop()
        yield

    kill(body)
    with start_try(2):
        remote = TWO_ROWS.remote(new_ctx()).single_node()
        assert run_query(remote.sink_parquet, FILE).location == [FILE]
    assert cluster_statuses(emulator) == ["Stopped", "Idle"]


def test_the_next_try_does_not_take_the_second_query_of_the_task_for_its_first(
    new_ctx: Callable[[], Any], start_try: StartTry
) -> None:
    def body() -> Iterator[None]:
        ctx = new_ctx()
        run_query(TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE)
        submit(ONE_ROW.remote(ctx).single_node().sink_parquet, OTHER_FILE)
        yield

    kill(body)
    with start_try(2):
        remote = TWO_ROWS.remote(new_ctx()).single_node()
        assert run_query(remote.sink_parquet, FILE).location == [FILE]


def test_the_next_try_does_not_resume_the_temporary_result_of_other_code(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[Any]:
        emulator.add_fault("SubmitQuery", "query_hangs")
        yield submit(TWO_ROWS.remote(new_ctx()).single_node().execute)

    kill(body)
    # Two: the cluster's only worker is busy until the first query is ended with the task.
    with start_try(2):
        query = submit(ONE_ROW.remote(new_ctx()).single_node().execute)
        leave(query)
    eventually(lambda: query_statuses(emulator) == ["Canceled", "Success"])


@pytest.mark.parametrize("end", [wait_for, leave])
def test_a_task_that_is_cleared_after_its_success_submits_anew(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry, end: Any
) -> None:
    for try_number, clear_number in ((1, 0), (2, 1)):
        with start_try(try_number, clear_number=clear_number):
            end(submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE))
    eventually(lambda: query_statuses(emulator) == ["Success", "Success"])


@pytest.mark.parametrize(
    "place", [{"task_id": "other"}, {"map_index": 1}, {"run_id": "manual__2"}, {"dag_id": "other"}]
)
def test_a_task_resumes_no_other_tasks_query(
    new_ctx: Callable[[], Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    place: dict[str, Any],
) -> None:
    def body() -> Iterator[Any]:
        yield submit(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)

    kill(body, map_index=0)
    with start_try(2, **{"map_index": 0, **place}):
        run_query(TWO_ROWS.remote(new_ctx()).single_node().sink_parquet, FILE)
    assert query_statuses(emulator) == ["Success", "Success"]


# leave


def test_a_query_that_is_left_runs_on_after_the_task(
    remote: Any, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try():
        query_id = leave(submit(remote.sink_parquet, FILE))
    [query] = emulator.state()["queries"]
    assert (query["id"], query["status"], query["cancels"]) == (query_id, "InProgress", 0)
    assert entries(supervisor, "task") == []


def test_a_query_that_is_left_runs_on_after_a_failure_of_the_task(
    remote: Any, emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try(raises=KeyError, match="mine"):
        leave(submit(remote.sink_parquet, FILE))
        raise KeyError("mine")
    assert query_statuses(emulator) == ["InProgress"]


def test_the_next_try_does_not_end_a_query_that_the_first_has_left(
    new_ctx: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[Any]:
        ctx = new_ctx()
        emulator.add_fault("SubmitQuery", "query_hangs", times=2)
        leave(submit(TWO_ROWS.remote(ctx).single_node().sink_parquet, FILE))
        yield submit(TWO_ROWS.remote(ctx).single_node().sink_parquet, OTHER_FILE)

    kill(body)
    with start_try(2, clear_number=1):
        pass
    assert query_statuses(emulator) == ["InProgress", "Canceled"]
