"""`queries.py`, `cloud/plans.py`: each query is recorded and submitted once, by every route."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import boto3
import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowTaskTimeout
from airflow.sdk.execution_time.timeout import timeout as execution_timeout
from polars._utils.cloud import prepare_cloud_plan

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import detach, use_cluster
from polars_remote.cloud.client import get_cluster_id, get_query_id
from polars_remote.cloud.plans import DATA_KEY, NODES_KEY, Plan, read_plan
from polars_remote.cloud.queries import describe
from polars_remote.cloud.session import CloudSession
from polars_remote.errors import (
    ClusterRefusedError,
    NotAuthenticatedError,
    QueryCanceledError,
    QueryLostError,
    QueryRefusedError,
)
from polars_remote.ownership.kills import TaskKilled
from polars_remote.ownership.labels import get_labels
from polars_remote.ownership.record import QueryRecord
from polars_remote.ownership.scope import current_scope
from polars_remote.queries import _Submission
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
def local_engine() -> Iterator[None]:
    """Restore the engine, which a worker that is killed inside `pl.Config` does not do."""
    yield
    pl.Config.set_engine_affinity(None)


@pytest.fixture
def ctx(pc: ModuleType, ti: Any, emulator: RunningEmulator) -> Iterator[Any]:
    """A context inside the test's task; unfinished queries are dropped."""

    class TestIsOver(Exception):
        pass

    with suppress(TestIsOver), use_cluster(CLUSTER, stop=False) as ctx:
        yield ctx
        emulator.clear_faults()
        raise TestIsOver


@pytest.fixture
def remote(ctx: Any) -> Any:
    """A remote query on a cluster of one worker."""
    return TWO_ROWS.remote(ctx).single_node()


def submit(ctx: Any, uri: str = FILE, frame: pl.LazyFrame = TWO_ROWS) -> Any:
    return frame.remote(ctx).single_node().sink_parquet(uri)


def stop_cluster(emulator: RunningEmulator, ctx: Any) -> None:
    """Stop the cluster as another user does; the context does not notice."""
    emulator.call("POST", f"compute/{get_cluster_id(ctx)}/stop")


def submit_as_somebody_else(pc: ModuleType, emulator: RunningEmulator, uri: str | None) -> Any:
    cluster = emulator.state()["clusters"][-1]
    other = pc.ComputeContext.connect(cluster["id"], workspace="playground")
    remote: Any = TWO_ROWS.with_columns(x=7).remote(other).single_node()
    return remote.sink_parquet(uri) if uri else remote.execute(blocking=False)


def occupy_cluster(pc: ModuleType, emulator: RunningEmulator) -> None:
    """Occupy the cluster, so that each further query is queued until it is canceled."""
    emulator.add_fault("SubmitQuery", "query_hangs")
    submit_as_somebody_else(pc, emulator, None)
    eventually(lambda: query_statuses(emulator)[-1] == "InProgress")


# The routes


def spawn(ctx: Any, **options: Any) -> list[Any]:
    import polars_cloud as pc

    return [pc.spawn(TWO_ROWS, dst=pc.ParquetDst(FILE), context=ctx, **options)]


def spawn_blocking(ctx: Any) -> None:
    import polars_cloud as pc

    pc.spawn_blocking(TWO_ROWS, dst=pc.ParquetDst(FILE), context=ctx)


def spawn_many_blocking(ctx: Any) -> None:
    import polars_cloud as pc

    pc.spawn_many_blocking([TWO_ROWS], dst=pc.ParquetDst(FILE), context=ctx)


def sink_with_affinity(ctx: Any) -> None:
    engine = pl.RemoteEngine(context=ctx, scaling_mode="single-node")
    with pl.Config(engine_affinity=engine):
        TWO_ROWS.sink_parquet(FILE)


def sink_two_at_once(ctx: Any) -> None:
    frames = [TWO_ROWS.sink_parquet(uri, lazy=True) for uri in (FILE, OTHER_FILE)]
    sinks: Any = pl.collect_all(frames, lazy=True)
    sinks.remote(ctx).single_node().execute()


ROUTES: dict[str, Callable[[Any], Any]] = {
    "sink_parquet": lambda ctx: TWO_ROWS.remote(ctx).single_node().sink_parquet(FILE),
    "sink_csv": lambda ctx: TWO_ROWS.remote(ctx).single_node().sink_csv(FILE),
    "sink_ipc": lambda ctx: TWO_ROWS.remote(ctx).single_node().sink_ipc(FILE),
    "sink_to_partitions": lambda ctx: (
        TWO_ROWS.remote(ctx).single_node().sink_parquet(pl.PartitionBy(DIRECTORY, key="x"))
    ),
    "sink_batches": lambda ctx: TWO_ROWS.remote(ctx).sink_batches(lambda batch: False),
    "execute": lambda ctx: TWO_ROWS.remote(ctx).execute(),
    "execute_not_blocking": lambda ctx: TWO_ROWS.remote(ctx).execute(blocking=False),
    "single_node": lambda ctx: TWO_ROWS.remote(ctx).single_node().execute(),
    "distributed": lambda ctx: TWO_ROWS.remote(ctx).distributed().execute(),
    "await_and_scan": lambda ctx: TWO_ROWS.remote(ctx).await_and_scan(),
    "show": lambda ctx: TWO_ROWS.remote(ctx).show(),
    "spawn": spawn,
    "spawn_blocking": spawn_blocking,
    "spawn_many_blocking": spawn_many_blocking,
    "awaited_in_a_loop": lambda ctx: asyncio.run(submit(ctx).await_result_async()),
    "sink_of_an_engine": lambda ctx: TWO_ROWS.sink_parquet(
        FILE, engine=pl.RemoteEngine(context=ctx, scaling_mode="single-node")
    ),
    "execute_of_an_engine": lambda ctx: TWO_ROWS.execute(engine=pl.RemoteEngine(context=ctx)),
    "affinity": sink_with_affinity,
    "default_context": lambda ctx: TWO_ROWS.remote().execute(),
    "two_sinks_at_once": sink_two_at_once,
}
"""Ways to submit a query through a context; a route that does not wait returns the query."""


def take(route: str, ctx: Any) -> None:
    """Submit a query by a route, and wait for its end."""
    returned = ROUTES[route](ctx)
    for query in returned if isinstance(returned, list) else [returned]:
        if hasattr(query, "await_result"):
            query.await_result()


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("route", ROUTES)
def test_by_each_route_a_query_is_on_record_and_labeled_before_it_is_sent(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor, route: str
) -> None:
    def look() -> list[dict[str, Any]]:
        eventually(lambda: calls(emulator, "SubmitQuery"))
        try:
            return entries(supervisor, "task")
        finally:
            emulator.clear_faults()  # which ends the delay

    emulator.add_fault("SubmitQuery", "delay", seconds=60)
    with ThreadPoolExecutor() as background, start_try(), use_cluster(CLUSTER) as ctx:
        looking = background.submit(look)
        take(route, ctx)
        labels = get_labels()
        [query] = emulator.state()["queries"]
    [task] = looking.result()
    [recorded] = task["queries"].values()
    assert (recorded["cluster_id"], recorded.get("query_id")) == (query["cluster_id"], None)
    assert (query["status"], query["labels"]) == ("Success", labels)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("route", ROUTES)
def test_by_each_route_a_query_that_fails_is_the_tasks_failure_and_the_cluster_is_stopped(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor, route: str
) -> None:
    error = pl.exceptions.SchemaError
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
    with start_try(raises=error, match="of a fault"), use_cluster(CLUSTER) as ctx:
        take(route, ctx)
    assert query_statuses(emulator) == ["Failed"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("route", ROUTES)
def test_by_each_route_a_query_that_hangs_into_a_time_out_is_canceled_and_the_cluster_stopped(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor, route: str
) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def end_time() -> None:
        eventually(lambda: has_submitted(supervisor))
        current_scope().record.deadline = time.time()
        signal.pthread_kill(main, signal.SIGALRM)

    emulator.add_fault("SubmitQuery", "query_hangs")
    with ThreadPoolExecutor() as background:
        with (
            start_try(raises=AirflowTaskTimeout),
            use_cluster(CLUSTER) as ctx,
            execution_timeout(600),
        ):
            ending = background.submit(end_time)
            take(route, ctx)
        ending.result()
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("route", ROUTES)
def test_by_each_route_a_query_is_canceled_and_the_cluster_stopped_when_a_user_marks_the_task(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor, route: str
) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def mark() -> None:
        eventually(lambda: has_submitted(supervisor))
        supervisor.states["manual__1"]["run_query"] = "success"
        signal.pthread_kill(main, signal.SIGTERM)

    emulator.add_fault("SubmitQuery", "query_hangs")
    with ThreadPoolExecutor() as background:
        with (
            start_try(raises=TaskKilled) as ti,
            restored_handler(signal.SIGTERM, lambda *_: ti.task.on_kill()),
            use_cluster(CLUSTER) as ctx,
        ):
            marking = background.submit(mark)
            take(route, ctx)
        marking.result()
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@contextmanager
def restored_handler(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Handle a signal in the body as Airflow's task runner does."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def has_submitted(supervisor: Supervisor) -> bool:
    """Return whether the task has recorded the id of its query."""
    return any(
        query.get("query_id")
        for task in entries(supervisor, "task")
        for query in task["queries"].values()
    )


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("route", [each for each in ROUTES if each != "default_context"])
def test_by_each_route_a_query_after_the_block_is_refused_before_anything_is_sent(
    emulator: RunningEmulator, start_try: StartTry, route: str
) -> None:
    with start_try():
        with use_cluster(CLUSTER) as ctx:
            pass
        with pytest.raises(QueryRefusedError, match="the use_cluster block of its context"):
            take(route, ctx)
    with pytest.raises(QueryRefusedError, match="its task has ended"):
        take(route, ctx)
    assert calls(emulator, "SubmitQuery") == 0
    assert cluster_statuses(emulator) == []


# Waiting for the result


def test_a_successful_query_returns_its_location_and_the_log_shows_id_rows_and_destination(
    remote: Any, caplog: pytest.LogCaptureFixture
) -> None:
    query = remote.sink_parquet(FILE)
    result = query.await_result()
    assert (result.location, result.n_rows_total) == ([FILE], 2)
    assert pl.read_parquet(FILE).to_dict(as_series=False) == {"x": [1, 2]}
    assert f"Submitted query {describe(query)}" in caplog.text
    [line] = [line for line in caplog.messages if " wrote " in line]
    assert line == f"Query {get_query_id(query)} wrote 2 rows to {FILE}"


def test_a_query_that_fails_on_its_data_raises_its_own_exception(
    ctx: Any, caplog: pytest.LogCaptureFixture
) -> None:
    query = submit(ctx, frame=TWO_ROWS.select("y"))
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="y"):
        query.await_result()
    assert f"Query failed: {describe(query)}" in caplog.text


@pytest.mark.parametrize("error", POLARS_ERRORS + BUILTIN_ERRORS)
def test_each_type_of_error_comes_through(
    remote: Any, emulator: RunningEmulator, error: type[Exception]
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error=f"{error.__name__}: of row 7")
    with pytest.raises(error, match="of row 7") as raised:
        remote.sink_parquet(FILE).await_result()
    assert raised.type is error


def test_an_error_of_an_unknown_type_comes_through_with_its_words(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="PanicException: of row 7")
    with pytest.raises(pl.exceptions.ComputeError, match="PanicException: of row 7"):
        remote.execute()


def test_a_failure_is_returned_if_the_caller_asks_not_to_raise_it(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of row 7")
    result = remote.sink_parquet(FILE).await_result(raise_on_failure=False)
    assert result.status.name == "FAILED"
    assert "of row 7" in str(result.finished_task_info.errors)


def test_a_query_canceled_from_elsewhere_fails_the_task_for_good(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = remote.sink_parquet(FILE)
    query_id = get_query_id(query)
    emulator.call("POST", f"query/{query_id}/cancel")
    with pytest.raises(QueryCanceledError, match=query_id) as raised:
        query.await_result()
    assert isinstance(raised.value, AirflowFailException)


def test_a_query_that_the_task_itself_has_canceled_is_no_error(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = remote.sink_parquet(FILE)
    query.cancel()
    assert query.await_result().status.name == "CANCELED"


def test_a_query_that_has_not_ended_in_the_clients_own_time_limit_is_a_timeout_error(
    remote: Any, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = remote.sink_parquet(FILE)
    monkeypatch.setenv("POLARS_TIMEOUT_MS", "100")
    with pytest.raises(TimeoutError, match="timed out"):
        query.await_result()
    monkeypatch.undo()
    query.cancel()
    query.await_result()


def test_a_result_that_has_to_have_a_location_and_has_none_is_an_error(ctx: Any) -> None:
    query = TWO_ROWS.remote(ctx).sink_batches(lambda batch: False)
    [record] = current_scope().record.queries.values()
    assert not record.has_location
    record.has_location = True
    with pytest.raises(QueryLostError, match="its result has no location"):
        query.await_result()


def test_an_outage_while_waiting_is_survived(remote: Any, emulator: RunningEmulator) -> None:
    query = remote.sink_parquet(FILE)
    emulator.add_fault("GetQueryStatus", "grpc_error", code="UNAVAILABLE", message="down")
    emulator.add_fault("GetQueryResult", "connection_reset")
    assert query.await_result().location == [FILE]


def test_an_outage_while_a_status_is_asked_for_or_a_query_canceled_is_survived(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = remote.sink_parquet(FILE)
    emulator.add_fault("GetQueryStatus", "grpc_error", code="UNAVAILABLE", message="down")
    assert not query.get_status().is_done()
    query.cancel()
    eventually(lambda: query.get_status().name == "CANCELED")


def test_a_result_can_be_asked_for_again(remote: Any) -> None:
    query = remote.sink_parquet(FILE)
    assert query.await_result().location == query.await_result().location == [FILE]


@pytest.mark.usefixtures("pc")
def test_a_thread_of_the_task_that_waits_ends_with_it(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def end_time() -> None:
        eventually(lambda: has_submitted(supervisor))
        current_scope().record.deadline = time.time()
        signal.pthread_kill(main, signal.SIGALRM)

    emulator.add_fault("SubmitQuery", "query_hangs")
    with ThreadPoolExecutor() as background:
        with (
            start_try(raises=AirflowTaskTimeout),
            use_cluster(CLUSTER) as ctx,
            execution_timeout(600),
            ThreadPoolExecutor() as threads,
        ):
            ending = background.submit(end_time)
            threads.submit(take, "sink_parquet", ctx).result()
        ending.result()
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("pc")
def test_a_thread_of_the_task_that_waits_ends_when_the_task_is_killed(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with (
        start_try(raises=SystemExit) as ti,
        use_cluster(CLUSTER) as ctx,
        ThreadPoolExecutor() as threads,
    ):
        waiting = threads.submit(take, "sink_parquet", ctx)
        eventually(lambda: has_submitted(supervisor))
        supervisor.states[ti.run_id][ti.task_id] = "failed"
        ti.task.on_kill()
    assert isinstance(waiting.exception(), SystemExit)
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("pc")
def test_a_thread_of_the_task_that_starts_its_cluster_ends_when_the_task_is_killed(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    emulator.add_fault("POST manifest/start", "startup_takes", seconds=600)
    with (
        start_try(raises=SystemExit) as ti,
        use_cluster(CLUSTER) as ctx,
        ThreadPoolExecutor() as threads,
    ):
        starting = threads.submit(take, "sink_parquet", ctx)
        eventually(lambda: cluster_statuses(emulator) == ["Starting"])
        supervisor.states[ti.run_id][ti.task_id] = "failed"
        ti.task.on_kill()
    assert isinstance(starting.exception(), SystemExit)
    assert query_statuses(emulator) == []
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


# What can be submitted


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
    result = getattr(remote, method)(DIRECTORY).await_result()
    assert scan(result.location).collect().to_dict(as_series=False) == {"x": [1, 2]}
    [query] = emulator.state()["queries"]
    assert query["mode"] == scaling


@pytest.mark.parametrize("scaling", ["single_node", "distributed"])
def test_a_temporary_result_is_handed_on_by_its_location(
    ctx: Any, emulator: RunningEmulator, scaling: str
) -> None:
    first = getattr(TWO_ROWS.remote(ctx), scaling)().execute()
    second = pl.scan_parquet(first.location).sum().remote(ctx).execute()
    assert pl.read_parquet(second.location).to_dict(as_series=False) == {"x": [3]}
    assert [query["mode"] for query in emulator.state()["queries"]] == [scaling, "distributed"]


def test_a_partitioned_sink_writes_a_directory_per_key(remote: Any) -> None:
    result = remote.sink_parquet(pl.PartitionBy(DIRECTORY, key="x")).await_result()
    assert result.n_rows_total == 2
    assert pl.read_parquet(f"{DIRECTORY}x=2/", hive_partitioning=True)["x"].to_list() == [2]


def test_two_sinks_of_one_query_are_both_written(ctx: Any) -> None:
    sink_two_at_once(ctx)
    for uri in (FILE, OTHER_FILE):
        assert pl.read_parquet(uri).to_dict(as_series=False) == {"x": [1, 2]}


def test_what_show_and_await_and_scan_give_is_the_result(ctx: Any) -> None:
    remote = TWO_ROWS.remote(ctx)
    assert remote.show().to_dict(as_series=False) == {"x": [1, 2]}
    assert remote.await_and_scan().collect().to_dict(as_series=False) == {"x": [1, 2]}


def test_a_query_keeps_its_priority(ctx: Any, emulator: RunningEmulator) -> None:
    remote: Any = TWO_ROWS.remote(ctx, priority=7)  # type: ignore[call-arg]  # polars_cloud's own
    remote.single_node().execute()
    [query] = emulator.state()["queries"]
    assert query["priority"] == 7


def test_a_query_carries_the_tasks_labels_beside_the_users_own(
    ctx: Any, emulator: RunningEmulator
) -> None:
    TWO_ROWS.remote(ctx).labels(["finance", "daily"]).single_node().execute()
    [query] = emulator.state()["queries"]
    assert query["labels"] == ["finance", "daily", *get_labels()]


def test_a_query_that_is_submitted_twice_carries_its_labels_once(
    remote: Any, emulator: RunningEmulator
) -> None:
    for uri in (FILE, OTHER_FILE):
        remote.sink_parquet(uri).await_result()
    assert [query["labels"] for query in emulator.state()["queries"]] == [get_labels()] * 2


def test_two_queries_of_a_task_at_once_are_two(ctx: Any) -> None:
    first, second = submit(ctx), submit(ctx, OTHER_FILE, ONE_ROW)
    assert [first.await_result().location, second.await_result().location] == [[FILE], [OTHER_FILE]]


def test_two_temporary_results_of_one_query_are_two(remote: Any, emulator: RunningEmulator) -> None:
    first, second = remote.execute(blocking=False), remote.execute(blocking=False)
    assert first.await_result().location != second.await_result().location
    assert query_statuses(emulator) == ["Success", "Success"]


# What is refused


@pytest.mark.parametrize("waits", [True, False])
def test_two_queries_for_one_destination_are_an_error_before_the_second_is_sent(
    ctx: Any, remote: Any, emulator: RunningEmulator, waits: bool
) -> None:
    first = remote.sink_parquet(FILE)
    if waits:
        first.await_result()
    with pytest.raises(QueryRefusedError, match="writes to") as raised:
        ONE_ROW.remote(ctx).single_node().sink_csv(FILE)
    assert FILE in str(raised.value)
    assert f"query {get_query_id(first)} of the same task" in str(raised.value)
    assert calls(emulator, "SubmitQuery") == 1


@pytest.mark.parametrize("route", ["sink_parquet", "two_sinks_at_once", "execute"])
def test_a_query_that_has_failed_may_be_submitted_again_by_the_task(
    ctx: Any, emulator: RunningEmulator, route: str
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
    with pytest.raises(pl.exceptions.SchemaError):
        take(route, ctx)
    take(route, ctx)
    assert query_statuses(emulator) == ["Failed", "Success"]


@pytest.mark.usefixtures("pc")
def test_a_query_that_its_block_has_canceled_may_be_submitted_again_by_the_task(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try():
        with suppress(ConnectionError), use_cluster(CLUSTER) as ctx:
            submit(ctx)
            raise ConnectionError
        with use_cluster(CLUSTER) as ctx:
            submit(ctx).await_result()
    assert query_statuses(emulator) == ["Canceled", "Success"]


def test_a_failure_that_is_seen_twice_lets_no_third_query_pass(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
    first = remote.sink_parquet(FILE)
    first.await_result(raise_on_failure=False)
    remote.sink_parquet(FILE)
    first.await_result(raise_on_failure=False)
    with pytest.raises(QueryRefusedError, match="writes to"):
        remote.sink_parquet(FILE)


def test_two_queries_for_one_partitioned_destination_are_an_error(remote: Any) -> None:
    remote.sink_parquet(pl.PartitionBy(DIRECTORY, key="x"))
    with pytest.raises(QueryRefusedError, match=f"writes to {DIRECTORY}"):
        remote.sink_csv(pl.PartitionBy(DIRECTORY, max_rows_per_file=1))


@pytest.mark.parametrize("first", ["sink_parquet", "two_sinks_at_once"])
def test_a_query_of_several_sinks_shares_no_destination_with_another(
    ctx: Any, emulator: RunningEmulator, first: str
) -> None:
    second = next(each for each in ("sink_parquet", "two_sinks_at_once") if each != first)
    take(first, ctx)
    with pytest.raises(QueryRefusedError, match=f"writes to {FILE}"):
        take(second, ctx)
    if first == "sink_parquet":
        submit(ctx, OTHER_FILE).await_result()  # which was released
    assert "Failed" not in query_statuses(emulator)


@pytest.mark.usefixtures("pc")
def test_of_two_threads_that_submit_one_destination_at_once_one_is_refused(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "delay", seconds=60)
    emulator.add_fault("SubmitQuery", "query_hangs", times=2)
    with start_try(raises=KeyError), use_cluster(CLUSTER) as ctx:
        with ThreadPoolExecutor() as threads:
            both = [threads.submit(submit, ctx) for _ in range(2)]
            eventually(lambda: any(each.done() for each in both))
            emulator.clear_faults()  # which ends the delay
        [refused] = [error for each in both if (error := each.exception())]
        assert isinstance(refused, QueryRefusedError)
        assert "query (id not known yet) of the same task" in str(refused)
        [query] = [each.result() for each in both if not each.exception()]
        assert [get_query_id(query)] == [each["id"] for each in emulator.state()["queries"]]
        [task] = entries(supervisor, "task")
        assert task["queries"][FILE]["query_id"] == get_query_id(query)
        with pytest.raises(QueryRefusedError, match=get_query_id(query)):
            submit(ctx)  # the refused block has not released the other block's use
        raise KeyError
    assert calls(emulator, "SubmitQuery") == 1
    assert query_statuses(emulator) in (["Canceled"], ["Success"])
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc")
def test_two_threads_start_one_cluster_and_submit_two_queries(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(), use_cluster(CLUSTER) as ctx, ThreadPoolExecutor() as threads:
        both = [threads.submit(submit, ctx, uri) for uri in (FILE, OTHER_FILE)]
        assert [each.result().await_result().location for each in both] == [[FILE], [OTHER_FILE]]
    assert query_statuses(emulator) == ["Success", "Success"]
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("over", ["block", "task"])
def test_a_thread_that_submits_after_the_end_of_the_block_or_the_task_is_refused(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor, over: str
) -> None:
    is_over = threading.Event()

    def submit_late(ctx: Any) -> Any:
        is_over.wait()
        return submit(ctx)

    with ThreadPoolExecutor() as threads:
        with start_try():
            with use_cluster(CLUSTER) as ctx:
                late = threads.submit(submit_late, ctx)
            if over == "block":
                is_over.set()
                assert isinstance(late.exception(), QueryRefusedError)
        is_over.set()
        assert isinstance(late.exception(), QueryRefusedError)
    assert calls(emulator, "SubmitQuery") == 0
    assert cluster_statuses(emulator) == []
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc")
def test_a_thread_that_submits_as_the_block_ends_does_not_start_the_cluster_again(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    with ThreadPoolExecutor() as threads:
        with start_try(), use_cluster(CLUSTER) as ctx:
            TWO_ROWS.remote(ctx).execute()
            emulator.add_fault("SubmitQuery", "delay", seconds=60)
            late = threads.submit(submit, ctx)
            eventually(lambda: calls(emulator, "SubmitQuery") == 2)
        emulator.clear_faults()  # which ends the delay
        assert isinstance(late.exception(), QueryRefusedError)
    assert query_statuses(emulator) == ["Success"]
    assert cluster_statuses(emulator) == ["Stopped"]


def test_a_query_that_a_thread_submits_as_the_block_ends_is_canceled(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    with ThreadPoolExecutor() as threads:
        with start_try(), use_cluster(CLUSTER, stop=False) as ctx:
            TWO_ROWS.remote(ctx).execute()
            occupy_cluster(pc, emulator)
            emulator.add_fault("SubmitQuery", "delay", seconds=60)
            late = threads.submit(submit, ctx)
            eventually(lambda: calls(emulator, "SubmitQuery") == 3)
        emulator.clear_faults()  # which ends the delay
        assert isinstance(late.exception(), QueryRefusedError)
    assert query_statuses(emulator) == ["Success", "InProgress", "Canceled"]


@pytest.mark.parametrize("method", ["sink_parquet", "sink_csv", "sink_ipc"])
@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "", "out.parquet", "results/", "file:///x"])
def test_a_destination_that_no_cluster_could_write_to_is_refused_and_starts_none(
    remote: Any, emulator: RunningEmulator, method: str, uri: str
) -> None:
    with pytest.raises(QueryRefusedError, match="give a URI such as") as raised:
        getattr(remote, method)(uri)
    assert isinstance(raised.value, AirflowFailException)
    assert repr(uri) in str(raised.value)
    assert calls(emulator, "SubmitQuery") == 0
    assert cluster_statuses(emulator) == []


def test_a_destination_is_free_again_when_its_query_was_refused_elsewhere(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "grpc_error", code="PERMISSION_DENIED", message="not yet")
    with pytest.raises(RuntimeError, match="not yet"):
        remote.sink_parquet(FILE)
    assert remote.sink_parquet(FILE).await_result().location == [FILE]


def test_a_query_outside_of_authenticate_is_refused_before_anything_is_sent(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    with (
        start_try(scope=False),
        pytest.raises(NotAuthenticatedError, match="put @authenticate below @task"),
        use_cluster(CLUSTER) as ctx,
    ):
        submit(ctx)
    assert query_statuses(emulator) == cluster_statuses(emulator) == []


# The cluster


def test_a_cluster_that_has_stopped_in_the_meantime_is_started_again(
    ctx: Any, emulator: RunningEmulator
) -> None:
    submit(ctx, OTHER_FILE).await_result()
    stop_cluster(emulator, ctx)
    assert submit(ctx).await_result().location == [FILE]
    assert cluster_statuses(emulator) == ["Stopped", "Idle"]


@pytest.mark.parametrize("how", ["asked for its status", "stopped by the task"])
def test_a_cluster_that_is_known_to_have_stopped_is_started_again(
    ctx: Any, emulator: RunningEmulator, how: str
) -> None:
    first = submit(ctx, OTHER_FILE)
    first.await_result()
    if how == "stopped by the task":
        ctx.stop()
    else:
        stop_cluster(emulator, ctx)
    assert ctx.get_status().name == ctx.get_status().name == "STOPPED"
    assert submit(ctx).await_result().location == [FILE]
    assert ctx.get_status().name == "IDLE"
    assert first.get_status().name == "SUCCESS"  # requested from the cluster that it ran on
    assert cluster_statuses(emulator) == ["Stopped", "Idle"]


def test_a_cluster_that_failed_to_start_is_started_again_by_the_next_query(
    ctx: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("POST manifest/start", "startup_fails", message="no capacity")
    with pytest.raises(RuntimeError, match="no capacity"):
        submit(ctx)
    assert submit(ctx).await_result().location == [FILE]
    assert cluster_statuses(emulator) == ["Failed", "Idle"]


@pytest.mark.usefixtures("pc")
def test_a_query_is_not_sent_before_the_cluster_that_a_killed_worker_started_is_running(
    emulator: RunningEmulator, start_try: StartTry, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_still = threading.Event()

    def stand_still(_: float) -> None:
        stands_still.set()
        threading.Event().wait()

    def body() -> Iterator[None]:
        with use_cluster(CLUSTER) as ctx:
            Thread(target=submit, args=(ctx,), name="killed-worker", daemon=True).start()
            assert stands_still.wait(60)  # between two polls
            yield

    def start_up() -> int:
        [cluster] = emulator.state()["clusters"]
        polls = calls(emulator, cluster["id"])
        eventually(lambda: calls(emulator, cluster["id"]) > polls + 5)
        sent = calls(emulator, "SubmitQuery")
        emulator.advance_clock(timedelta(minutes=3))
        return sent

    emulator.add_fault("POST manifest/start", "startup_takes", seconds=180)
    with monkeypatch.context() as of_first_try:
        standing = SimpleNamespace(sleep=stand_still, monotonic=time.monotonic)
        of_first_try.setattr("polars_remote.clusters.time", standing)
        kill(body)
    monkeypatch.setattr("polars_remote.clusters.START_POLL_SECONDS", 0.1)
    with ThreadPoolExecutor() as background:
        starting_up = background.submit(start_up)
        with start_try(2), use_cluster(CLUSTER) as ctx:
            assert submit(ctx).await_result().location == [FILE]
        assert starting_up.result() == 0
    assert cluster_statuses(emulator) == ["Stopped"]


def test_a_cluster_that_stops_just_before_the_submission_is_started_again(
    ctx: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    submit(ctx, OTHER_FILE).await_result()  # connects
    emulator.add_fault("SubmitQuery", "delay", seconds=60)
    with ThreadPoolExecutor() as background:
        running = background.submit(submit, ctx)
        eventually(lambda: calls(emulator, "SubmitQuery") == 2)
        stop_cluster(emulator, ctx)
        emulator.clear_faults()  # which ends the delay
        assert running.result().await_result().location == [FILE]
    assert cluster_statuses(emulator) == ["Stopped", "Idle"]
    assert "stopped before it accepted the query; starting another one" in caplog.text


@pytest.mark.parametrize("uri", [FILE, None])
def test_a_query_whose_cluster_is_stopped_as_it_was_submitted_is_submitted_again_once(
    ctx: Any,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    uri: str | None,
) -> None:
    def stop() -> None:
        eventually(lambda: query_statuses(emulator) == ["InProgress"])
        stop_cluster(emulator, ctx)

    emulator.add_fault("SubmitQuery", "query_hangs")
    with ThreadPoolExecutor() as background:
        background.submit(stop)
        query = submit(ctx, uri) if uri else TWO_ROWS.remote(ctx).execute(blocking=False)
        result = query.await_result()
    assert result.n_rows_total == 2
    assert pl.read_parquet(result.location).height == 2
    assert query_statuses(emulator) == ["Failed", "Success"]
    assert cluster_statuses(emulator) == ["Stopped", "Idle"]
    first, second = emulator.state()["queries"]
    assert first["labels"] == second["labels"]
    assert f"stopped while query {first['id']} was submitted; submitting" in caplog.text
    [task] = entries(supervisor, "task")
    assert [each["query_id"] for each in task["queries"].values()] == [second["id"]]
    assert query.get_status().name == "SUCCESS"


def test_a_query_whose_cluster_is_stopped_twice_fails(ctx: Any, emulator: RunningEmulator) -> None:
    def stop() -> None:
        eventually(lambda: query_statuses(emulator) == ["InProgress"])
        stop_cluster(emulator, ctx)
        eventually(lambda: query_statuses(emulator) == ["Failed", "InProgress"])
        [_, second] = emulator.state()["clusters"]
        emulator.call("POST", f"compute/{second['id']}/stop")

    emulator.add_fault("SubmitQuery", "query_hangs", times=3)
    with ThreadPoolExecutor() as background:
        background.submit(stop)
        with pytest.raises(RuntimeError, match="was stopped"):
            submit(ctx).await_result()
    assert query_statuses(emulator) == ["Failed", "Failed"]


def test_a_query_that_has_run_for_a_while_when_its_cluster_is_stopped_fails(
    ctx: Any, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polars_remote.queries.RESUBMIT_SECONDS", 0.0)
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(ctx)
    stop_cluster(emulator, ctx)
    with pytest.raises(RuntimeError, match="was stopped"):
        query.await_result()
    assert query_statuses(emulator) == ["Failed"]


def test_a_query_whose_cluster_has_failed_under_it_is_not_submitted_again(
    ctx: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "cluster_lost", message="no more spot instances")
    with pytest.raises(RuntimeError, match="no more spot instances"):
        submit(ctx).await_result()
    eventually(lambda: cluster_statuses(emulator) == ["Failed"])
    assert query_statuses(emulator) == ["Failed"]


def test_a_query_that_fails_on_its_data_is_not_submitted_again(
    ctx: Any, emulator: RunningEmulator
) -> None:
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        submit(ctx, frame=TWO_ROWS.select("y")).await_result()
    assert calls(emulator, "SubmitQuery") == 1


# The reply


@pytest.mark.parametrize("uri", [FILE, DIRECTORY])
def test_a_submission_whose_reply_is_lost_is_found_again(
    remote: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture, uri: str
) -> None:
    emulator.add_fault("SubmitQuery", "answer_lost")
    query = remote.sink_parquet(uri)
    assert "The query was accepted although the reply was lost" in caplog.text
    assert pl.read_parquet(query.await_result().location).height == 2
    assert query_statuses(emulator) == ["Success"]


def test_a_partitioned_submission_whose_reply_is_lost_is_found_again(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "answer_lost")
    remote.sink_parquet(pl.PartitionBy(DIRECTORY, key="x")).await_result()
    assert query_statuses(emulator) == ["Success"]


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
    assert remote.sink_parquet(FILE).await_result().location == [FILE]
    assert query_statuses(emulator) == ["Success"]


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("kind", ["answer_lost", "connection_reset"])
def test_yesterdays_query_is_never_mistaken_for_the_one_whose_reply_was_lost(
    emulator: RunningEmulator, start_try: StartTry, kind: str
) -> None:
    cluster = {**CLUSTER, "idle_timeout_mins": YEAR}
    with start_try(run_id="yesterday"), use_cluster(cluster, stop=False) as ctx:
        submit(ctx).await_result()
    # From here on, the clocks of Polars Cloud and of the worker differ by a day.
    emulator.advance_clock(timedelta(days=1))
    with start_try(run_id="today"), use_cluster(cluster, stop=False) as ctx:
        emulator.add_fault("SubmitQuery", kind)
        submit(ctx, frame=ONE_ROW).await_result()
    assert pl.read_parquet(FILE).height == 1
    assert query_statuses(emulator) == ["Success", "Success"]
    assert cluster_statuses(emulator) == ["Idle"]


def test_a_query_whose_destination_has_the_same_beginning_is_not_mistaken_for_the_lost_one(
    ctx: Any, pc: ModuleType, emulator: RunningEmulator
) -> None:
    sales, by_day = "s3://your-bucket/results/sales", "s3://your-bucket/results/sales_by_day"

    def submit_another_tasks() -> None:
        eventually(lambda: calls(emulator, "SubmitQuery") == 2)
        submit_as_somebody_else(pc, emulator, by_day)
        emulator.clear_faults()  # the first submission's connection is reset

    submit(ctx).await_result()
    emulator.add_fault("SubmitQuery", "stall")
    with ThreadPoolExecutor() as background:
        background.submit(submit_another_tasks)
        ours = submit(ctx, sales, ONE_ROW)
    assert len(query_statuses(emulator)) == 3
    assert pl.read_parquet(ours.await_result().location).height == 1


def test_a_temporary_result_whose_reply_is_lost_is_asked_for_again(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "answer_lost")
    [location] = remote.execute().location
    eventually(lambda: query_statuses(emulator) == ["Success", "Success"])
    lost, ours = emulator.state()["queries"]
    assert location in ours["destinations"]
    assert location not in lost["destinations"]


def test_a_temporary_result_whose_reply_is_lost_is_never_mistaken_for_anothers(
    ctx: Any, pc: ModuleType, emulator: RunningEmulator
) -> None:
    submit(ctx).await_result()
    submit_as_somebody_else(pc, emulator, None).await_result()
    emulator.add_fault("SubmitQuery", "connection_reset")
    location = TWO_ROWS.remote(ctx).execute().location
    assert pl.read_parquet(location)["x"].to_list() == [1, 2]


@pytest.mark.parametrize("uri", [FILE, None])
def test_a_submission_that_is_accepted_after_it_was_repeated_leaves_no_second_query(
    ctx: Any,
    pc: ModuleType,
    emulator: RunningEmulator,
    monkeypatch: pytest.MonkeyPatch,
    uri: str | None,
) -> None:
    monkeypatch.setitem(CloudSession.call.__kwdefaults__, "call_timeout", 2.0)
    emulator.add_fault("SubmitQuery", "delay", seconds=60)
    query = submit(ctx, uri) if uri else TWO_ROWS.remote(ctx).execute(blocking=False)
    query.await_result()
    occupy_cluster(pc, emulator)
    emulator.clear_faults()  # which ends the delay: the first attempt arrives
    eventually(lambda: query_statuses(emulator) == ["Success", "InProgress", "Canceled"])
    assert query.get_status().name == "SUCCESS"


@pytest.mark.parametrize("uri", [FILE, None])
def test_a_submission_that_is_accepted_after_the_task_is_out_of_time_is_canceled(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, uri: str | None
) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def end_time() -> None:
        eventually(lambda: calls(emulator, "SubmitQuery") == 3)
        signal.pthread_kill(main, signal.SIGALRM)

    with (
        ThreadPoolExecutor() as background,
        start_try(raises=AirflowTaskTimeout),
        use_cluster(CLUSTER, stop=False) as ctx,
        execution_timeout(600),
    ):
        TWO_ROWS.remote(ctx).execute()
        occupy_cluster(pc, emulator)
        emulator.add_fault("SubmitQuery", "delay", seconds=60)
        background.submit(end_time)
        if uri:
            submit(ctx, uri)
        else:
            TWO_ROWS.remote(ctx).execute()
    emulator.clear_faults()  # which ends the delay
    eventually(lambda: query_statuses(emulator) == ["Success", "InProgress", "Canceled"])


def test_a_submission_that_is_refused_is_an_error_and_runs_nowhere(
    remote: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "grpc_error", code="PERMISSION_DENIED", message="for good")
    with pytest.raises(RuntimeError, match="for good"):
        remote.sink_parquet(FILE)
    assert calls(emulator, "SubmitQuery") == 1
    assert query_statuses(emulator) == []


@pytest.mark.usefixtures("pc")
def test_a_submission_that_is_given_up_after_it_was_accepted_is_canceled(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def take_long(df: pl.DataFrame) -> pl.DataFrame:
        time.sleep(600)
        return df

    with start_try(raises=ValueError, match="for good"), use_cluster(CLUSTER) as ctx:
        emulator.add_fault("SubmitQuery", "answer_lost")
        emulator.add_fault("GET query", "http_error", nth=2, status=403, message="for good")
        submit(ctx, frame=ONE_ROW.map_batches(take_long))
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_temporary_result_that_is_accepted_as_the_task_is_interrupted_is_canceled(
    ctx: Any, pc: ModuleType, emulator: RunningEmulator
) -> None:
    submit(ctx).await_result()
    emulator.add_fault("SubmitQuery", "query_hangs")
    submission = _Submission(
        current_scope().session,
        ctx,
        QueryRecord(cluster_id=get_cluster_id(ctx) or "", manifest="shop", known=[]),
        lambda: submit_as_somebody_else(pc, emulator, None),
    )
    submission.attempt()
    submission.cancel_duplicates(None)
    eventually(lambda: query_statuses(emulator) == ["Success", "Canceled"])


# An expired result


def delete_results() -> None:
    s3: Any = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    bucket = "polars-cloud-temporary"
    for stored in s3.list_objects_v2(Bucket=bucket)["Contents"]:
        s3.delete_object(Bucket=bucket, Key=stored["Key"])
    s3.close()


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("upstream", ["clean_sales", None])
def test_a_temporary_result_that_has_expired_names_the_task_to_clear(
    start_try: StartTry, upstream: str | None
) -> None:
    with start_try(task_id="clean_sales"), use_cluster(CLUSTER, stop=False) as ctx:
        location = TWO_ROWS.remote(ctx).execute().location
    delete_results()
    with (
        pytest.raises(FileNotFoundError) as raised,
        start_try(task_id="sum_days", upstream=upstream),
        use_cluster(CLUSTER, stop=False) as ctx,
    ):
        submit(ctx, frame=pl.scan_parquet(location)).await_result()
    notes = getattr(raised.value, "__notes__", [])
    assert any("it has expired: clear clean_sales" in note for note in notes) is bool(upstream)


# The next try


@pytest.mark.usefixtures("pc")
def test_the_next_try_of_a_killed_worker_resumes_the_running_query(
    emulator: RunningEmulator, start_try: StartTry, caplog: pytest.LogCaptureFixture
) -> None:
    def body() -> Iterator[Any]:
        emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
        with use_cluster(CLUSTER, stop=False) as ctx:
            yield submit(ctx)

    first = kill(body)
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        second = submit(ctx)
        assert get_query_id(second) == get_query_id(first)
        assert f"Resuming query of try 1: {describe(first)}" in caplog.text
        emulator.advance_clock(timedelta(seconds=60))
        assert second.await_result().location == [FILE]
    assert query_statuses(emulator) == ["Success"]


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("route", [each for each in ROUTES if each != "default_context"])
def test_by_each_route_the_next_try_of_a_killed_worker_resumes_the_query(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor, route: str
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER) as ctx:
            Thread(target=take, args=(route, ctx), name="killed-worker", daemon=True).start()
            eventually(lambda: has_submitted(supervisor))
            yield

    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    kill(body)
    with ThreadPoolExecutor() as background, start_try(2), use_cluster(CLUSTER) as ctx:
        background.submit(let_pass, emulator, supervisor)
        take(route, ctx)
    assert query_statuses(emulator) == ["Success"]
    assert calls(emulator, "SubmitQuery") == 1
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def let_pass(emulator: RunningEmulator, supervisor: Supervisor) -> None:
    """End the query after the second try has adopted it."""

    def is_resumed() -> bool:
        return any(
            query["try_number"] == 2
            for task in entries(supervisor, "task")
            for query in task["queries"].values()
        )

    eventually(is_resumed)
    emulator.advance_clock(timedelta(seconds=60))


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("uri", [FILE, DIRECTORY])
def test_the_next_try_of_a_killed_worker_takes_the_result_of_a_query_that_has_succeeded(
    emulator: RunningEmulator, start_try: StartTry, uri: str
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            yield submit(ctx, uri)

    kill(body)
    eventually(lambda: query_statuses(emulator) == ["Success"])
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        location = submit(ctx, uri).await_result().location
    assert location == emulator.state()["queries"][0]["destinations"]
    assert pl.read_parquet(location).height == 2
    assert query_statuses(emulator) == ["Success"]
    assert cluster_statuses(emulator) == ["Idle"]


@pytest.mark.usefixtures("pc")
def test_the_next_try_of_a_killed_worker_resumes_all_its_queries(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    cluster = {**CLUSTER, "cluster_size": 5}

    def submit_all(ctx: Any) -> list[Any]:
        two, one = TWO_ROWS.remote(ctx).single_node(), ONE_ROW.remote(ctx).single_node()
        return [
            two.sink_parquet(FILE),
            one.sink_csv(OTHER_FILE),
            two.execute(blocking=False),
            two.execute(blocking=False),
            one.execute(blocking=False),
        ]

    def body() -> Iterator[Any]:
        emulator.add_fault("SubmitQuery", "query_takes", seconds=60, times=5)
        with use_cluster(cluster, stop=False) as ctx:
            yield submit_all(ctx)

    first = kill(body)
    with start_try(2), use_cluster(cluster, stop=False) as ctx:
        second = submit_all(ctx)
        assert [get_query_id(query) for query in second] == [get_query_id(query) for query in first]
        emulator.advance_clock(timedelta(seconds=60))
        assert [query.await_result().n_rows_total for query in second] == [2, 1, 2, 2, 1]
    assert query_statuses(emulator) == ["Success"] * 5


@pytest.mark.usefixtures("pc")
def test_the_next_try_resumes_what_an_earlier_try_had_resumed_itself(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            yield submit(ctx)

    emulator.add_fault("SubmitQuery", "query_hangs")
    first, second = kill(body), kill(body, 2)
    with start_try(3), use_cluster(CLUSTER, stop=False) as ctx:
        third = submit(ctx)
        assert get_query_id(first) == get_query_id(second) == get_query_id(third)
        detach(third)


@pytest.mark.usefixtures("pc")
def test_the_next_try_finds_a_query_whose_id_the_first_had_no_time_to_record(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            with ThreadPoolExecutor() as background:
                submitting = background.submit(submit, ctx)
                eventually(lambda: calls(emulator, "SubmitQuery"))
                recorded_so_far = dict(supervisor.variables)
                emulator.clear_faults()  # which ends the delay
                query = submitting.result()
            supervisor.variables = recorded_so_far
            yield query

    emulator.add_fault("SubmitQuery", "delay", seconds=60)
    first = kill(body)
    assert "query_id" not in entries(supervisor, "task")[0]["queries"][FILE]
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        second = submit(ctx)
        assert get_query_id(second) == get_query_id(first)
        second.await_result()


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("end", ["failed", "canceled"])
def test_the_next_try_submits_a_query_again_that_cannot_succeed(
    emulator: RunningEmulator, start_try: StartTry, end: str
) -> None:
    def body() -> Iterator[Any]:
        if end == "failed":
            emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
        else:
            emulator.add_fault("SubmitQuery", "query_hangs")
        with use_cluster(CLUSTER, stop=False) as ctx:
            yield submit(ctx)

    first = kill(body)
    if end == "canceled":
        emulator.call("POST", f"query/{get_query_id(first)}/cancel")
    eventually(lambda: query_statuses(emulator) == [end.title()])
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        assert submit(ctx).await_result().location == [FILE]
    assert query_statuses(emulator) == [end.title(), "Success"]


@pytest.mark.usefixtures("pc")
def test_the_next_try_after_a_failure_uses_the_cluster_that_the_first_has_started(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
    with (
        start_try(raises=pl.exceptions.SchemaError),
        use_cluster(CLUSTER, stop=False) as ctx,
    ):
        submit(ctx).await_result()
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        submit(ctx).await_result()
    assert query_statuses(emulator) == ["Failed", "Success"]
    assert cluster_statuses(emulator) == ["Idle"]


@pytest.mark.usefixtures("pc")
def test_the_next_try_starts_a_cluster_when_that_of_the_first_has_stopped(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[None]:
        emulator.add_fault("SubmitQuery", "query_hangs")
        with use_cluster(CLUSTER, stop=False) as ctx:
            submit(ctx)
            stop_cluster(emulator, ctx)
            yield

    kill(body)
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        assert submit(ctx).await_result().location == [FILE]
    assert cluster_statuses(emulator) == ["Stopped", "Idle"]


@pytest.mark.usefixtures("pc")
def test_the_next_try_does_not_take_the_second_query_of_the_task_for_its_first(
    start_try: StartTry,
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            submit(ctx).await_result()
            submit(ctx, OTHER_FILE, ONE_ROW)
            yield

    kill(body)
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        assert submit(ctx).await_result().location == [FILE]


@pytest.mark.usefixtures("pc")
def test_the_next_try_does_not_resume_the_temporary_result_of_other_code(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[None]:
        emulator.add_fault("SubmitQuery", "query_hangs")
        with use_cluster(CLUSTER, stop=False) as ctx:
            TWO_ROWS.remote(ctx).execute(blocking=False)
            yield

    kill(body)
    # Two: the cluster's only worker is busy until the first query is canceled.
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        detach(ONE_ROW.remote(ctx).execute(blocking=False))
    eventually(lambda: query_statuses(emulator) == ["Canceled", "Success"])


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("end", [lambda query: query.await_result(), detach])
def test_a_task_that_is_cleared_after_its_success_submits_again(
    emulator: RunningEmulator, start_try: StartTry, end: Callable[[Any], object]
) -> None:
    for try_number, clear_number in ((1, 0), (2, 1)):
        with (
            start_try(try_number, clear_number=clear_number),
            use_cluster(CLUSTER, stop=False) as ctx,
        ):
            end(submit(ctx))
    eventually(lambda: query_statuses(emulator) == ["Success", "Success"])


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize(
    "place", [{"task_id": "other"}, {"map_index": 1}, {"run_id": "manual__2"}, {"dag_id": "other"}]
)
def test_a_task_resumes_no_other_tasks_query(
    emulator: RunningEmulator, start_try: StartTry, place: dict[str, Any]
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            submit(ctx)
            yield

    kill(body, map_index=0)
    with start_try(2, **{"map_index": 0, **place}), use_cluster(CLUSTER, stop=False) as ctx:
        submit(ctx).await_result()
    assert query_statuses(emulator) == ["Success", "Success"]


# detach


@pytest.mark.usefixtures("pc")
def test_a_query_that_is_detached_runs_on_after_the_task(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try(), use_cluster(CLUSTER, stop=False) as ctx:
        query_id = detach(submit(ctx))
    eventually(lambda: query_statuses(emulator) == ["InProgress"])
    [query] = emulator.state()["queries"]
    assert (query["id"], query["cancels"]) == (query_id, 0)
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc")
def test_a_query_that_is_detached_runs_on_after_a_failure_of_the_task(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try(raises=KeyError, match="mine"), use_cluster(CLUSTER, stop=False) as ctx:
        detach(submit(ctx))
        raise KeyError("mine")
    eventually(lambda: query_statuses(emulator) == ["InProgress"])


@pytest.mark.usefixtures("pc")
def test_the_next_try_does_not_end_a_query_that_the_first_has_detached(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[None]:
        emulator.add_fault("SubmitQuery", "query_hangs", times=2)
        with use_cluster(CLUSTER, stop=False) as ctx:
            submit(ctx, OTHER_FILE)
            detach(submit(ctx))
            yield

    kill(body)
    with start_try(2, clear_number=1):
        pass
    eventually(lambda: query_statuses(emulator) == ["Canceled", "InProgress"])


# The plan


def make_plan(frame: pl.LazyFrame) -> bytes:
    plan: Any = prepare_cloud_plan(frame, optimizations=pl.QueryOptFlags())
    return bytes(plan[0] if isinstance(plan, tuple) else plan)


def read(frame: pl.LazyFrame) -> Plan:
    return read_plan(make_plan(frame))


LAZY_SINKS: dict[str, Callable[[pl.LazyFrame], pl.LazyFrame]] = {
    "parquet": lambda frame: frame.sink_parquet(FILE, lazy=True),
    "csv": lambda frame: frame.sink_csv(FILE, lazy=True),
    "ipc": lambda frame: frame.sink_ipc(FILE, lazy=True),
    "ndjson": lambda frame: frame.sink_ndjson(FILE, lazy=True),
    "partitions": lambda frame: frame.sink_parquet(pl.PartitionBy(FILE, key="x"), lazy=True),
}


@pytest.mark.parametrize("sink", LAZY_SINKS)
def test_the_destination_of_each_sink_is_read_from_its_plan(sink: str) -> None:
    plan = read(LAZY_SINKS[sink](TWO_ROWS))
    assert (plan.destinations, plan.has_location) == ((FILE,), True)


@pytest.mark.parametrize(
    "uri", ["s3://bücket/日本/🐻.parquet", "s3://b/" + "x" * 70_000, "s3://b/ ?#"]
)
def test_a_destination_is_read_as_it_was_written(uri: str) -> None:
    assert read(TWO_ROWS.sink_parquet(uri, lazy=True)).destinations == (uri,)


def test_the_destinations_of_several_sinks_are_read() -> None:
    sinks: Any = pl.collect_all(
        [
            frame.sink_csv(uri, lazy=True)
            for frame, uri in ((TWO_ROWS, FILE), (ONE_ROW, OTHER_FILE))
        ],
        lazy=True,
    )
    assert read(sinks).destinations == (FILE, OTHER_FILE)


@pytest.mark.parametrize(
    ("frame", "has_location"),
    [
        (TWO_ROWS.sink_parquet("<in-memory>", lazy=True), True),
        (TWO_ROWS.sink_parquet("<flight>", lazy=True), False),
        (TWO_ROWS.sink_batches(print, lazy=True), False),
    ],
    ids=["temporary", "to the client", "batches"],
)
def test_a_result_without_a_destination_has_none(frame: pl.LazyFrame, has_location: bool) -> None:
    plan = read(frame)
    assert (plan.destinations, plan.has_location) == ((), has_location)


@pytest.mark.parametrize(
    "scan",
    [pl.scan_parquet, pl.scan_csv, pl.scan_ipc, pl.scan_ndjson],
    ids=lambda scan: scan.__name__,
)
def test_the_paths_of_each_scan_are_read_from_its_plan(scan: Any) -> None:
    paths = ("s3://b/sales/*.x", "s3://b/stock/")
    inside = pl.concat([scan([*paths]), scan("gs://b/one"), TWO_ROWS], how="horizontal")
    frame = inside.join(scan("s3://b/two").filter(pl.col("x") > 1), on="x")
    found = read(frame.sink_parquet(FILE, lazy=True)).scans
    assert sorted(found) == [("gs://b/one",), paths, ("s3://b/two",)]


def test_another_destination_or_another_query_has_another_digest() -> None:
    frames = [
        frame.sink_parquet(uri, lazy=True)
        for frame in (TWO_ROWS, ONE_ROW, pl.LazyFrame({"x": [1, 3]}))
        for uri in (FILE, OTHER_FILE, "<in-memory>")
    ]
    assert len({read(frame).digest for frame in frames}) == len(frames)


MAKE_FRAME = """
import polars as pl
frame = (
    pl.scan_parquet(["s3://bucket/one.parquet", "s3://bucket/two.parquet"], hive_partitioning=True)
    .join(pl.LazyFrame({"x": [1, 2], "y": ["a", "b"]}), on="x")
    .with_columns(pl.col("x").is_in([3, 1, 2]), pl.struct("x", "y").alias("both"))
    .group_by("y").agg(pl.col("x").sum(), pl.len())
    .sink_parquet("<in-memory>", lazy=True)
)
"""


def make_frame() -> pl.LazyFrame:
    names: dict[str, Any] = {}
    exec(MAKE_FRAME, names)
    frame: pl.LazyFrame = names["frame"]
    return frame


def test_the_same_code_has_the_same_digest() -> None:
    assert read(make_frame()) == read(make_frame())


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_same_code_has_the_same_digest_in_another_process(seed: str) -> None:
    code = f"""
{MAKE_FRAME}
import polars_cloud
from polars._utils.cloud import prepare_cloud_plan
from polars_remote.cloud.plans import read_plan
plan = prepare_cloud_plan(frame, optimizations=pl.QueryOptFlags())
print(read_plan(plan[0] if isinstance(plan, tuple) else plan).digest)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": seed},
    )
    assert answer.stdout.split()[-1] == read(make_frame()).digest


LOOKS_LIKE_NODES = [
    pytest.param({"x": ["dsl_plans", "\xa9dsl_plans", "dataframes"]}, id="texts"),
    pytest.param({"x": [list(NODES_KEY * 3), list(DATA_KEY)]}, id="numbers"),
    pytest.param({"x": [NODES_KEY * 3, NODES_KEY + b"\x90", DATA_KEY]}, id="bytes"),
    pytest.param({"dsl_plans": [1], "dataframes": [2], "\xa9dsl_plans": [3]}, id="columns"),
]


@pytest.mark.parametrize("data", LOOKS_LIKE_NODES)
def test_data_of_a_frame_that_looks_like_a_part_of_the_plan_is_not_mistaken_for_it(
    data: Any,
) -> None:
    frame = pl.DataFrame(data).lazy()
    assert read(frame.sink_parquet(FILE, lazy=True)).destinations == (FILE,)


@pytest.mark.parametrize("text", ["dsl_plans", "dataframes", "\xa9dsl_plans\x90", "dsl_plans" * 99])
def test_texts_in_a_query_that_look_like_a_part_of_the_plan_are_not_mistaken_for_it(
    text: str,
) -> None:
    uri = f"s3://your-bucket/{text}/dsl_plans"
    frame = (
        pl.DataFrame({text: ["a"]})
        .lazy()
        .with_columns(pl.lit(text).alias("dsl_plans"), pl.lit(text.encode()).alias("dataframes"))
        .filter(pl.col(text) != text)
        .rename({text: "last"})
        .map_batches(lambda df: df.with_columns(pl.lit(text)))
        .sink_parquet(uri, lazy=True)
    )
    assert read(frame).destinations == (uri,)


def test_the_data_of_a_large_frame_is_not_decoded() -> None:
    numbers = random.Random(7)
    data = {"x": [numbers.getrandbits(60) for _ in range(500_000)], "y": ["dsl_plans"] * 500_000}
    plan = make_plan(pl.LazyFrame(data).sink_parquet(FILE, lazy=True))
    assert len(plan) > 4_000_000
    tracemalloc.start()
    try:
        assert read_plan(plan).destinations == (FILE,)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(plan) / 10


@pytest.mark.parametrize("plan", [b"", b"DSL_VERSION", b"x" * 1_000, DATA_KEY * 9, NODES_KEY * 99])
def test_what_is_no_plan_is_an_error(plan: bytes) -> None:
    with pytest.raises(ValueError, match="Cannot read the query's plan"):
        read_plan(plan)


@pytest.mark.usefixtures("pc")
def test_a_large_frame_is_submitted_and_resumed(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    frame = pl.LazyFrame({"x": range(200_000), "y": ["dsl_plans"] * 200_000})

    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            yield frame.remote(ctx).execute(blocking=False)

    first = kill(body)
    with start_try(2), use_cluster(CLUSTER, stop=False) as ctx:
        second = frame.remote(ctx).execute(blocking=False)
        assert second.await_result().n_rows_total == 200_000
        assert get_query_id(second) == get_query_id(first)
    assert query_statuses(emulator) == ["Success"]


def test_a_query_without_a_context_is_refused_outside_a_block(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(raises=QueryRefusedError, match="names no cluster"):
        with use_cluster(CLUSTER):
            TWO_ROWS.remote().execute()
        TWO_ROWS.remote().execute()
    assert query_statuses(emulator) == ["Success"]
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti")
def test_queries_without_a_context_run_on_the_cluster_of_their_own_coroutines_block(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    async def ask(name: str) -> None:
        with use_cluster({**CLUSTER, "name": name}):
            await asyncio.sleep(0)  # the other thread opens its block
            query = TWO_ROWS.remote().single_node().sink_parquet(f"{DIRECTORY}{name}.parquet")
            await query.await_result_async()

    async def ask_both() -> None:
        await asyncio.gather(ask("one"), ask("two"))

    asyncio.run(ask_both())
    manifests = {each["id"]: each["manifest"] for each in emulator.state()["clusters"]}
    ran = {
        query["destinations"][0]: manifests[query["cluster_id"]]
        for query in emulator.state()["queries"]
    }
    assert ran == {f"{DIRECTORY}{name}.parquet": name for name in ("one", "two")}


def test_a_new_try_does_not_wait_behind_an_earlier_query_that_it_has_not_resumed(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER) as ctx:
            emulator.add_fault("SubmitQuery", "query_hangs")
            TWO_ROWS.remote(ctx).single_node().sink_parquet(FILE)
            yield

    kill(body)
    with start_try(2), use_cluster(CLUSTER) as ctx:
        result = TWO_ROWS.remote(ctx).single_node().sink_parquet(OTHER_FILE).await_result()
        assert result.location == [OTHER_FILE]
    assert query_statuses(emulator) == ["Canceled", "Success"]


@pytest.mark.parametrize("kind", ["query_takes", "query_waits"])
def test_a_detached_query_keeps_its_cluster(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    kind: str,
) -> None:
    emulator.add_fault("SubmitQuery", kind, seconds=60)
    with start_try(), use_cluster(CLUSTER) as ctx:
        detach(TWO_ROWS.remote(ctx).single_node().sink_parquet(FILE))
    emulator.advance_clock(timedelta(seconds=60))
    eventually(lambda: query_statuses(emulator) == ["Success"])
    assert cluster_statuses(emulator) == ["Idle"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("act", ["register", "unregister"])
def test_a_context_of_a_block_keeps_its_manifest(pc: ModuleType, act: str) -> None:
    with use_cluster(CLUSTER) as ctx, pytest.raises(ClusterRefusedError):
        getattr(ctx, act)(*(["mine"] if act == "register" else []))
