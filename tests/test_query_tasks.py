"""`query_tasks.py`: a task succeeds when its returned queries have succeeded."""

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date, timedelta
from types import ModuleType
from typing import Any

import httpx
import polars as pl
import pytest
from airflow.sdk import DAG, Asset, AssetAlias, get_current_context, task, task_group
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from airflow.serialization.serialized_objects import DagSerialization

from include.auth import authenticate
from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import (
    Query,
    detach,
    ensure_manifest,
    query_task,
    query_tasks,
    use_cluster,
)
from polars_remote.cloud.client import get_query_id
from polars_remote.errors import (
    QueryCanceledError,
    QueryLostError,
    QueryNotAwaitedError,
    QueryRefusedError,
)
from polars_remote.links import QueryLink
from polars_remote.ownership.end import end_orphans
from polars_remote.ownership.kills import TaskKilled
from polars_remote.ownership.scope import current_scope
from polars_remote.waiting import deferral
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, TriedTask, deferral_of

FILE = "s3://your-bucket/results/two.parquet"
OTHER_FILE = "s3://your-bucket/results/other.parquet"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})
ONE_ROW = TWO_ROWS.head(1)
CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}
OTHER_CLUSTER = {**CLUSTER, "name": "warehouse"}
PAIR = {**CLUSTER, "cluster_size": 2}
HELD = 60.0
REPORTS = Asset("reports", "s3://your-bucket/reports")

RESULTS = {
    FILE: {"location": [FILE], "rows": 2},
    OTHER_FILE: {"location": [OTHER_FILE], "rows": 1},
}
RESULT = {FILE: RESULTS[FILE]}


@pytest.fixture(autouse=True)
def defer_late(pc: ModuleType, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defer no short query, even on a slow machine."""
    monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 300.0)


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defer a task at once if its queries have not ended."""
    monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)


@pytest.fixture
def hold(emulator: RunningEmulator) -> Callable[[], None]:
    """Hold the next query until `end_held`."""
    return lambda: emulator.add_fault("SubmitQuery", "query_takes", seconds=HELD)


@pytest.fixture
def end_held(emulator: RunningEmulator) -> Callable[[], None]:
    def end() -> None:
        emulator.advance_clock(timedelta(seconds=HELD))
        eventually(lambda: not {"Scheduled", "InProgress"} & set(query_statuses(emulator)))

    return end


def sink(ctx: Any, uri: str = FILE, frame: pl.LazyFrame = TWO_ROWS) -> Any:
    return frame.remote(ctx).single_node().sink_parquet(uri)


def ask() -> Any:
    with use_cluster(CLUSTER, stop=False) as ctx:
        return sink(ctx)


def ask_on_a_cluster_of_its_own() -> Any:
    with use_cluster(CLUSTER) as ctx:
        return sink(ctx)


def using(cluster: dict[str, Any], function: Callable[[Any], Any]) -> Callable[[], Any]:
    """Body of a task whose cluster is not stopped."""

    def ask() -> Any:
        with use_cluster(cluster, stop=False) as ctx:
            return function(ctx)

    return ask


@contextmanager
def once_it_is_looked_at(emulator: RunningEmulator, act: Callable[[], None]) -> Iterator[None]:
    """Call a function when the worker has polled its query and waits."""
    looks = calls(emulator, "GetQueryStatus")

    def wait_and_act() -> None:
        eventually(lambda: calls(emulator, "GetQueryStatus") > looks + 1)
        act()

    with ThreadPoolExecutor() as background:
        acted = background.submit(wait_and_act)
        yield
        acted.result()


# What a task returns


def ask_for_one(ctx: Any) -> Any:
    return sink(ctx)


def ask_for_a_list(ctx: Any) -> Any:
    return [sink(ctx), sink(ctx, OTHER_FILE, ONE_ROW)]


def ask_for_a_dict(ctx: Any) -> Any:
    return {"all": sink(ctx), "first": sink(ctx, OTHER_FILE, ONE_ROW)}


def ask_for_a_mix(ctx: Any) -> Any:
    query = sink(ctx)
    return {
        "day": date(2026, 1, 2),
        "size": (1, "two"),
        "all": {"parquet": [query, None]},
        "first": sink(ctx, OTHER_FILE, ONE_ROW),
        "all again": query,
        "numbers": {"pi": 3.14, "none": []},
    }


def ask_for_a_tuple(ctx: Any) -> Any:
    return sink(ctx), "two rows"


SHAPES: list[tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = [
    # The return value, made from placeholders of two queries.
    (ask_for_one, lambda one, other: one),
    (ask_for_a_list, lambda one, other: [one, other]),
    (ask_for_a_dict, lambda one, other: {"all": one, "first": other}),
    (
        ask_for_a_mix,
        lambda one, other: {
            "day": date(2026, 1, 2),
            "size": (1, "two"),
            "all": {"parquet": [one, None]},
            "first": other,
            "all again": one,
            "numbers": {"pi": 3.14, "none": []},
        },
    ),
    (ask_for_a_tuple, lambda one, other: (one, "two rows")),
]
in_each_shape = pytest.mark.parametrize(
    ("function", "shape"), SHAPES, ids=[function.__name__ for function, _ in SHAPES]
)


def extra(task: TriedTask, asset: Asset = REPORTS) -> Any:
    """Return the extra of the task's asset event."""
    return task.context["outlet_events"][asset].extra


@in_each_shape
def test_a_short_query_gives_its_location_and_an_event_of_the_outlet(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    function: Callable[[Any], Any],
    shape: Callable[[Any, Any], Any],
) -> None:
    task = TriedTask(using(CLUSTER, function), outlets=[REPORTS])
    assert task.run() == shape([FILE], [OTHER_FILE])
    assert extra(task) == {"location": shape([FILE], [OTHER_FILE]), "rows": shape(2, 1)}
    assert set(query_statuses(emulator)) == {"Success"}
    assert pl.read_parquet(FILE).to_dict(as_series=False) == {"x": [1, 2]}
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
@in_each_shape
def test_a_long_query_gives_the_same(
    hold: Callable[[], None],
    supervisor: Supervisor,
    function: Callable[[Any], Any],
    shape: Callable[[Any, Any], Any],
) -> None:
    task = TriedTask(using(PAIR, function), outlets=[REPORTS])
    hold()
    kwargs = deferral_of(task.run).trigger.serialize()[1]
    event = {
        "results": {each["destination"]: RESULTS[each["destination"]] for each in kwargs["queries"]}
    }
    assert task.resume(event) == shape([FILE], [OTHER_FILE])
    assert extra(task) == {"location": shape([FILE], [OTHER_FILE]), "rows": shape(2, 1)}
    assert supervisor.variables == {}


@pytest.mark.parametrize(
    "value", [None, [FILE, "two"], {"rows": 2}, (date(2026, 1, 2), "two"), "two", 0]
)
def test_a_value_without_queries_comes_back_as_it_is(
    emulator: RunningEmulator, supervisor: Supervisor, value: Any
) -> None:
    assert TriedTask(lambda: value).run() is value
    assert supervisor.variables == {}
    assert query_statuses(emulator) == []


def test_a_query_that_was_waited_for_needs_no_return() -> None:
    def ask_and_wait(ctx: Any) -> Any:
        result = sink(ctx).await_result()
        return result.location, result.n_rows_total

    assert TriedTask(using(CLUSTER, ask_and_wait)).run() == ([FILE], 2)


def test_a_query_that_blocks_gives_its_location_and_an_event_of_the_outlet(
    emulator: RunningEmulator, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    def ask_and_block(ctx: Any) -> Any:
        return {"all": TWO_ROWS.remote(ctx).single_node().execute(), "file": sink(ctx)}

    task = TriedTask(using(CLUSTER, ask_and_block), outlets=[REPORTS])
    returned = task.run()
    [location] = returned["all"]
    assert "To hold no worker slot, leave out await_result()" in caplog.text
    assert returned["file"] == [FILE]
    assert extra(task) == {"location": returned, "rows": {"all": 2, "file": 2}}
    assert pl.read_parquet(location).to_dict(as_series=False) == {"x": [1, 2]}
    assert calls(emulator, "SubmitQuery") == 2
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
def test_a_query_that_blocks_is_waited_for_in_the_worker_however_long_it_takes(
    hold: Callable[[], None], end_held: Callable[[], None], emulator: RunningEmulator
) -> None:
    def ask_and_block(ctx: Any) -> Any:
        return TWO_ROWS.remote(ctx).single_node().execute()

    hold()
    with once_it_is_looked_at(emulator, end_held):
        [location] = TriedTask(using(CLUSTER, ask_and_block)).run()
    assert pl.read_parquet(location).to_dict(as_series=False) == {"x": [1, 2]}


@pytest.mark.usefixtures("deferring")
def test_the_result_of_a_query_that_has_blocked_outlives_a_deferral(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    def ask_and_block(ctx: Any) -> Any:
        return [TWO_ROWS.remote(ctx).single_node().execute(), sink(ctx)]

    task = TriedTask(using(CLUSTER, ask_and_block), outlets=[REPORTS])
    emulator.add_fault("SubmitQuery", "query_takes", nth=2, seconds=HELD)
    deferral_of(task.run)
    [location], location_of_file = task.resume({"results": RESULT})
    assert location_of_file == [FILE]
    assert extra(task)["rows"] == [2, 2]
    assert pl.read_parquet(location).to_dict(as_series=False) == {"x": [1, 2]}
    assert supervisor.variables == {}


def test_a_query_that_blocks_and_fails_raises_its_own_exception(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    def ask_and_block() -> Any:
        with use_cluster(CLUSTER) as ctx:
            return TWO_ROWS.select("y").remote(ctx).single_node().execute()

    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="y"):
        TriedTask(ask_and_block).run()
    assert query_statuses(emulator) == ["Failed"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_result_of_a_query_that_the_task_has_canceled_is_an_error(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    def ask_and_cancel(ctx: Any) -> Any:
        query = sink(ctx)
        query.cancel()
        return {"two": query.await_result()}

    emulator.add_fault("SubmitQuery", "query_hangs")
    with pytest.raises(QueryCanceledError, match="Somebody canceled this query"):
        TriedTask(using(CLUSTER, ask_and_cancel)).run()
    assert supervisor.variables == {}


@pytest.mark.parametrize("where", ["in the worker", "deferred"])
def test_a_query_and_its_result_may_be_returned_any_number_of_times(
    hold: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def ask_and_repeat(ctx: Any) -> Any:
        first, second = sink(ctx, OTHER_FILE, ONE_ROW), sink(ctx)
        return [second, [first.await_result(), first], {"again": (second, {"more": [second]})}]

    task = TriedTask(using(PAIR, ask_and_repeat), outlets=[REPORTS])
    if where == "deferred":
        monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)
        emulator.add_fault("SubmitQuery", "query_takes", nth=2, seconds=HELD)
        deferred = deferral_of(task.run)
        queries = deferred.trigger.serialize()[1]["queries"]
        assert [each["destination"] for each in queries] == [FILE]
        returned = task.resume({"results": RESULT})
    else:
        returned = task.run()
    others = [[OTHER_FILE], [OTHER_FILE]]
    assert returned == [[FILE], others, {"again": ([FILE], {"more": [[FILE]]})}]
    assert extra(task)["rows"] == [2, [1, 1], {"again": (2, {"more": [2]})}]
    assert calls(emulator, "SubmitQuery") == 2
    assert supervisor.variables == {}


def test_a_temporary_result_is_returned_as_any_other() -> None:
    def ask(ctx: Any) -> Any:
        return TWO_ROWS.remote(ctx).single_node().execute(blocking=False)

    [location] = TriedTask(using(CLUSTER, ask)).run()
    assert pl.read_parquet(location).to_dict(as_series=False) == {"x": [1, 2]}


def test_the_cluster_of_a_short_query_is_stopped(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    assert TriedTask(ask_on_a_cluster_of_its_own).run() == [FILE]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.fixture
def event_loop() -> Iterator[None]:
    """A new event loop, closed at the end; Airflow leaves its own open until the process ends."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.usefixtures("event_loop")
def test_an_async_function_is_waited_for_as_any_other(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    supervisor: Supervisor,
) -> None:
    async def ask_later() -> Any:
        return ask()

    task = TriedTask(ask_later)
    assert task.run() == [FILE]
    monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)
    hold()
    deferral_of(task.run)
    end_held()
    assert task.resume() == [FILE]
    assert supervisor.variables == {}


# A long query


@pytest.mark.usefixtures("deferring")
def test_a_task_with_a_long_query_is_deferred_and_its_query_and_cluster_continue(
    hold: Callable[[], None], emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    hold()
    deferral = deferral_of(TriedTask(ask_on_a_cluster_of_its_own).run)
    assert deferral.method_name == "resume"
    assert deferral.timeout > timedelta(0)
    assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
    eventually(lambda: query_statuses(emulator) == ["InProgress"])
    eventually(lambda: cluster_statuses(emulator) == ["Running"])
    [entry] = entries(supervisor, "task")
    assert list(entry["queries"]) == [FILE]
    assert [entry["manifest"] for entry in entries(supervisor, "cluster")] == ["shop"]


@pytest.mark.usefixtures("deferring")
def test_a_deferred_task_is_a_user_of_its_cluster(
    hold: Callable[[], None], emulator: RunningEmulator, start_try: StartTry
) -> None:
    hold()
    deferral_of(TriedTask(ask_on_a_cluster_of_its_own).run)
    with start_try(task_id="other"), use_cluster(CLUSTER):
        pass
    eventually(lambda: cluster_statuses(emulator) == ["Running"])


@pytest.mark.usefixtures("deferring")
def test_a_task_that_is_resumed_with_results_stops_its_cluster_and_logs_them(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = TriedTask(ask_on_a_cluster_of_its_own)
    hold()
    deferral_of(task.run)
    [entry] = entries(supervisor, "task")
    end_held()
    caplog.clear()
    assert task.resume({"results": RESULT}) == [FILE]
    query_id = entry["queries"][FILE]["query_id"]
    assert re.search(f"Query {query_id} wrote 2 rows to {FILE}$", caplog.text, re.MULTILINE)
    assert calls(emulator, "CancelQuery") == 0
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
def test_polars_cloud_is_not_called_for_results_from_a_cluster_that_nobody_stops(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
) -> None:
    task = TriedTask(ask)
    hold()
    deferral_of(task.run)
    end_held()
    # In Airflow, the worker's process and its threads end with the deferral.
    eventually(lambda: all(each.name != "polars-cloud-wait" for each in threading.enumerate()))
    before = len(emulator.journal())
    assert task.resume({"results": RESULT}) == [FILE]
    assert [entry["path"] for entry in emulator.journal()[before:]] == []  # no login either
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
def test_a_task_that_is_resumed_without_results_looks_for_itself(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = TriedTask(ask_on_a_cluster_of_its_own)
    hold()
    deferral_of(task.run)
    end_held()
    caplog.clear()
    assert task.resume() == [FILE]
    assert re.search(f" wrote 2 rows to {FILE}$", caplog.text, re.MULTILINE)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_query_that_ends_within_the_time_in_the_worker_defers_nothing(
    hold: Callable[[], None], end_held: Callable[[], None], emulator: RunningEmulator
) -> None:
    hold()
    with once_it_is_looked_at(emulator, end_held):
        assert TriedTask(ask).run() == [FILE]


@pytest.mark.usefixtures("deferring")
def test_a_task_waits_in_its_worker_where_deferring_is_switched_off(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(query_tasks, "DEFERS", False)
    hold()
    with once_it_is_looked_at(emulator, end_held):
        assert TriedTask(ask_on_a_cluster_of_its_own).run() == [FILE]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


# What goes wrong with a query


def fail_first(ctx: Any) -> Any:
    return [sink(ctx, FILE, TWO_ROWS.select("y")), sink(ctx, OTHER_FILE)]


def fail_last(ctx: Any) -> Any:
    sibling = sink(ctx, OTHER_FILE)
    return [sibling, sink(ctx, FILE, TWO_ROWS.select("y"))]


@pytest.mark.usefixtures("short_outages")
@pytest.mark.parametrize("where", ["in the worker", "deferred"])
@pytest.mark.parametrize("function", [fail_first, fail_last])
def test_a_query_that_fails_raises_its_own_exception_and_its_sibling_is_canceled(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: Callable[[Any], Any],
    where: str,
) -> None:
    def ask() -> Any:
        with use_cluster(PAIR) as ctx:
            return function(ctx)

    hanging, failing = (2, 1) if function is fail_first else (1, 2)
    emulator.add_fault("SubmitQuery", "query_hangs", nth=hanging)
    task = TriedTask(ask)
    if where == "deferred":
        monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)
        emulator.add_fault("SubmitQuery", "query_takes", nth=failing, seconds=HELD)
        deferral_of(task.run)
        eventually(lambda: query_statuses(emulator) == ["InProgress", "InProgress"])
        emulator.advance_clock(timedelta(seconds=HELD))
        eventually(lambda: "Failed" in query_statuses(emulator))
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="y"):
        task.resume() if where == "deferred" else task.run()
    assert sorted(query_statuses(emulator)) == ["Canceled", "Failed"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert "failed" in caplog.text
    assert supervisor.variables == {}


def test_an_error_that_polars_does_not_know_comes_through(emulator: RunningEmulator) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: no such type")
    with pytest.raises(pl.exceptions.SchemaError, match="no such type"):
        TriedTask(ask).run()


@pytest.mark.parametrize("where", ["in the worker", "deferred"])
def test_a_query_that_is_canceled_from_elsewhere_fails_the_task_for_good(
    hold: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def cancel() -> None:
        [query] = emulator.state()["queries"]
        emulator.call("POST", f"query/{query['id']}/cancel")

    task = TriedTask(ask_on_a_cluster_of_its_own)
    hold()
    if where == "deferred":
        monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)
        deferral_of(task.run)
        cancel()
        with pytest.raises(QueryCanceledError, match="Somebody canceled") as raised:
            task.resume()
    else:
        with (
            once_it_is_looked_at(emulator, cancel),
            pytest.raises(QueryCanceledError, match="Somebody canceled") as raised,
        ):
            task.run()
    [query] = emulator.state()["queries"]
    assert query["id"] in str(raised.value)
    assert isinstance(raised.value, AirflowFailException)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def stop_cluster(emulator: RunningEmulator) -> str:
    """Stop the only cluster, as another user does; return its id."""
    [cluster] = emulator.state()["clusters"]
    emulator.call("POST", f"compute/{cluster['id']}/stop")
    return str(cluster["id"])


@pytest.mark.usefixtures("deferring")
def test_a_cluster_that_has_stopped_before_the_query_ended_is_an_error(
    hold: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(query_tasks, "RESUBMIT_SECONDS", 0.0)
    task = TriedTask(ask)
    hold()
    deferral_of(task.run)
    cluster_id = stop_cluster(emulator)
    with pytest.raises(QueryLostError, match=f"{cluster_id} stopped .* before query .* had ended"):
        task.resume()
    assert supervisor.variables == {}


@pytest.mark.parametrize("where", ["in the worker", "deferred"])
def test_a_query_whose_cluster_was_stopped_as_it_was_submitted_is_submitted_again(
    hold: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    def stop_it() -> None:
        stop_cluster(emulator)

    task = TriedTask(ask_on_a_cluster_of_its_own, outlets=[REPORTS])
    hold()
    if where == "deferred":
        monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)
        deferral_of(task.run)
        stop_it()
        monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 300.0)
        assert task.resume() == [FILE]
    else:
        with once_it_is_looked_at(emulator, stop_it):
            assert task.run() == [FILE]
    assert "submitting the query again" in caplog.text
    assert calls(emulator, "SubmitQuery") == 2
    assert query_statuses(emulator)[-1] == "Success"
    assert extra(task) == {"location": [FILE], "rows": 2}
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]
    assert supervisor.variables == {}


# A query that is not on record, or that nobody waits for


def query_by_hand(cluster: dict[str, Any], uri: str = OTHER_FILE) -> Any:
    """Submit a query on a context that `use_cluster` did not create."""
    import polars_cloud

    with current_scope().session.logged_in():
        workspace = current_scope().session.find_workspace()
        ctx = polars_cloud.ComputeContext(workspace=workspace, name=cluster["name"])
        ctx.start(wait=True)
        return sink(ctx, uri)


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_query_on_a_context_made_by_hand_is_canceled_and_refused_without_a_retry(
    emulator: RunningEmulator, supervisor: Supervisor, is_nested: bool
) -> None:
    def ask_by_hand() -> Any:
        ensure_manifest(CLUSTER)
        query = query_by_hand(CLUSTER)
        return {"all": [None, (query,)]} if is_nested else query

    emulator.add_fault("SubmitQuery", "query_hangs")
    with pytest.raises(QueryRefusedError, match="on the context that use_cluster yields") as raised:
        TriedTask(ask_by_hand).run()
    assert isinstance(raised.value, AirflowFailException)
    [query] = emulator.state()["queries"]
    assert query["id"] in str(raised.value)
    assert query["status"] == "Canceled"
    assert supervisor.variables == {}


def test_each_query_on_a_context_made_by_hand_is_canceled(emulator: RunningEmulator) -> None:
    def ask_by_hand() -> Any:
        ensure_manifest(PAIR)
        return [query_by_hand(PAIR), {"file": query_by_hand(PAIR, FILE)}]

    emulator.add_fault("SubmitQuery", "query_hangs", times=2)
    with pytest.raises(QueryRefusedError) as raised:
        TriedTask(ask_by_hand).run()
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert all(query["id"] in str(raised.value) for query in emulator.state()["queries"])


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_query_that_is_refused_takes_the_others_and_their_cluster_with_it(
    emulator: RunningEmulator, supervisor: Supervisor, where: str
) -> None:
    def ask_by_hand_as_well() -> Any:
        with use_cluster(PAIR) as ctx:
            queries = [sink(ctx), query_by_hand(PAIR)]
            return queries if where == "last" else queries[::-1]

    emulator.add_fault("SubmitQuery", "query_hangs", times=2)
    with pytest.raises(QueryRefusedError):
        TriedTask(ask_by_hand_as_well).run()
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
@pytest.mark.parametrize("returned", ["nothing", "another", "in a set"])
def test_a_query_that_is_neither_returned_nor_waited_for_is_an_error_and_canceled(
    emulator: RunningEmulator, supervisor: Supervisor, returned: str
) -> None:
    def ask() -> Any:
        with use_cluster(PAIR) as ctx:
            query = sink(ctx)
            if returned == "another":
                return [sink(ctx, OTHER_FILE)]
            return {query} if returned == "in a set" else None

    emulator.add_fault("SubmitQuery", "query_hangs", times=2)
    with pytest.raises(QueryNotAwaitedError, match=f"has not waited for its query for {FILE}, "):
        TriedTask(ask).run()
    assert set(query_statuses(emulator)) == {"Canceled"}
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_forgotten_query_that_fails_soon_raises_its_own_exception(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    def ask(ctx: Any) -> Any:
        sink(ctx, FILE, TWO_ROWS.select("y"))
        return sink(ctx, OTHER_FILE)

    emulator.add_fault("SubmitQuery", "query_hangs", nth=2)
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="y"):
        TriedTask(using(PAIR, ask)).run()
    assert sorted(query_statuses(emulator)) == ["Canceled", "Failed"]
    assert supervisor.variables == {}


def test_a_query_that_was_detached_is_neither_waited_for_nor_canceled(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query_id = TriedTask(using(CLUSTER, lambda ctx: detach(sink(ctx)))).run()
    [query] = emulator.state()["queries"]
    assert (query["id"], query["cancels"]) == (query_id, 0)
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
def test_a_plain_task_may_not_return_a_query(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with DAG("shop", schedule=None):
        made: Any = task(task_id="run_query")(authenticate(ask))()
        operator = made.operator
    raises = {"raises": QueryNotAwaitedError, "match": "has not waited"}
    with start_try(task=operator, scope=False, **raises):
        operator.execute(get_current_context())
    assert query_statuses(emulator) == ["Canceled"]
    assert supervisor.variables == {}


@pytest.mark.parametrize(
    "wrap",
    [lambda query: query, lambda query: query.await_result(), lambda query: {"all": [query]}],
    ids=["query", "result", "nested"],
)
def test_an_error_about_a_plain_task_that_returns_a_query_names_query_task(
    supervisor: Supervisor, wrap: Callable[[Any], Any], start_try: StartTry
) -> None:
    def ask_and_return() -> Any:
        with use_cluster(CLUSTER) as ctx:
            query = sink(ctx)
            query.await_result()
            return wrap(query)

    with DAG("shop", schedule=None):
        made: Any = task(task_id="run_query")(authenticate(ask_and_return))()
    raises = {"raises": QueryRefusedError, "match": "replace @task by @query_task"}
    with start_try(task=made.operator, scope=False, **raises):
        made.operator.execute(get_current_context())
    assert supervisor.variables == {}


def test_a_plain_task_whose_value_airflow_does_not_store_may_return_a_result(
    start_try: StartTry,
) -> None:
    def ask_and_return() -> Any:
        with use_cluster(CLUSTER) as ctx:
            return sink(ctx).await_result()

    with DAG("shop", schedule=None):
        run_query = task(task_id="run_query", do_xcom_push=False)(authenticate(ask_and_return))
        made: Any = run_query()
    with start_try(task=made.operator, scope=False):
        made.operator.execute(get_current_context())


# A record that somebody deletes while the task is deferred


def resume_stored(
    task: TriedTask, deferred: TaskDeferred, event: dict[str, Any] | None = None
) -> Any:
    """Resume the task with the deferral that Airflow itself has stored."""
    return task._resume("resume", {**(deferred.kwargs or {}), "event": event or {}})


@pytest.mark.usefixtures("deferring")
@in_each_shape
def test_results_that_the_trigger_has_seen_outlive_the_record(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    function: Callable[[Any], Any],
    shape: Callable[[Any, Any], Any],
) -> None:
    task = TriedTask(using(PAIR, function), outlets=[REPORTS])
    emulator.add_fault("SubmitQuery", "query_takes", times=2, seconds=HELD)
    deferred = deferral_of(task.run)
    end_held()
    supervisor.variables.clear()
    before = len(emulator.journal())
    assert resume_stored(task, deferred, {"results": RESULTS}) == shape([FILE], [OTHER_FILE])
    assert extra(task) == {"location": shape([FILE], [OTHER_FILE]), "rows": shape(2, 1)}
    assert emulator.journal()[before:] == []
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
@pytest.mark.parametrize("seen", [{}, RESULT])
def test_without_its_record_a_query_whose_result_nobody_has_seen_is_lost(
    emulator: RunningEmulator, supervisor: Supervisor, seen: dict[str, Any]
) -> None:
    task = TriedTask(using(PAIR, ask_for_a_list))
    emulator.add_fault("SubmitQuery", "query_takes", times=2, seconds=HELD)
    deferred = deferral_of(task.run)
    eventually(lambda: query_statuses(emulator) == ["InProgress", "InProgress"])
    supervisor.variables.clear()
    lost = OTHER_FILE if seen else FILE
    message = f"The record of the query for {lost} is gone. The query may still run, but the task"
    with pytest.raises(QueryLostError, match=message) as raised:
        resume_stored(task, deferred, {"results": seen})
    assert not isinstance(
        raised.value, AirflowFailException
    )  # the next try submits the query again
    assert query_statuses(emulator) == ["InProgress", "InProgress"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
def test_without_its_record_and_its_trigger_a_task_says_that_nobody_waits_for_its_queries(
    hold: Callable[[], None], emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    task = TriedTask(ask)
    hold()
    deferral_of(task.run)
    supervisor.variables.clear()
    before = len(emulator.journal())
    with pytest.raises(QueryLostError, match=r"of this task is gone\. .* may still run"):
        task.resume_without_trigger()
    assert len(emulator.journal()) == before
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
def test_a_cluster_whose_use_is_still_on_record_is_stopped_although_its_task_is_not(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
) -> None:
    task = TriedTask(ask_on_a_cluster_of_its_own)
    hold()
    deferred = deferral_of(task.run)
    end_held()
    for key in [key for key in supervisor.variables if key.startswith("polars_cloud/task/")]:
        del supervisor.variables[key]
    assert resume_stored(task, deferred, {"results": RESULT}) == [FILE]
    assert end_orphans() == []
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


# SIGTERM


@pytest.fixture
def sigterm(emulator: RunningEmulator) -> Iterator[Callable[[TriedTask], None]]:
    """Send SIGTERM to a task that waits in its worker, with Airflow's own handler."""
    before = signal.getsignal(signal.SIGTERM)

    def send(task: TriedTask) -> None:
        signal.signal(signal.SIGTERM, lambda *_: task.operator.on_kill())
        looks = calls(emulator, "GetQueryStatus")

        def kill() -> None:
            eventually(lambda: calls(emulator, "GetQueryStatus") > looks)
            os.kill(os.getpid(), signal.SIGTERM)

        background.submit(kill)

    with ThreadPoolExecutor() as background:
        yield send
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("waits", ["for what it returns", "in its function"])
def test_a_user_who_ends_a_task_in_its_worker_ends_its_queries_and_its_cluster(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    sigterm: Callable[[TriedTask], None],
    waits: str,
) -> None:
    def ask_and_mark() -> Any:
        with use_cluster(PAIR) as ctx:
            queries = [sink(ctx), sink(ctx, OTHER_FILE)]
            supervisor.states["manual__1"]["run_query"] = "failed"
            sigterm(tried)
            return queries if waits == "for what it returns" else queries[0].await_result()

    emulator.add_fault("SubmitQuery", "query_hangs", times=2)
    tried = TriedTask(ask_and_mark)
    with pytest.raises(TaskKilled):
        tried.run()
    assert query_statuses(emulator) == ["Canceled", "Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_worker_that_is_shut_down_leaves_the_queries_of_its_task_to_the_next_try(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    sigterm: Callable[[TriedTask], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def ask_and_kill() -> Any:
        sigterm(tried)
        return ask_on_a_cluster_of_its_own()

    tried = TriedTask(ask_and_kill)
    hold()
    with pytest.raises(TaskKilled):
        tried.run()
    assert "The worker is shutting down. The task's queries keep running" in caplog.text
    assert query_statuses(emulator) == ["InProgress"]
    assert cluster_statuses(emulator) == ["Running"]
    assert len(supervisor.variables) == 2
    end_held()
    assert TriedTask(ask_on_a_cluster_of_its_own).run(2) == [FILE]
    assert calls(emulator, "SubmitQuery") == 1
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


# A cluster that stops by itself while another query is running


def ask_two_clusters() -> Any:
    """Submit two queries to two clusters: the first ends at once, the second is held."""
    with use_cluster(CLUSTER) as shop, use_cluster(OTHER_CLUSTER) as warehouse:
        return [sink(shop), sink(warehouse, OTHER_FILE, ONE_ROW)]


def stop_the_first_cluster(emulator: RunningEmulator) -> None:
    """Stop the first cluster, as its idle timeout does."""
    eventually(lambda: query_statuses(emulator)[0] == "Success")
    [cluster_id] = (
        each["id"] for each in emulator.state()["clusters"] if each["manifest"] == "shop"
    )
    emulator.call("POST", f"compute/{cluster_id}/stop")


def test_a_result_outlives_its_cluster_while_the_task_is_deferred_for_another_query(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    end_held: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask_and_see_the_first_end() -> Any:
        queries = ask_two_clusters()
        eventually(lambda: query_statuses(emulator)[0] == "Success")
        return queries

    monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)
    emulator.add_fault("SubmitQuery", "query_takes", nth=2, seconds=HELD)
    task = TriedTask(ask_and_see_the_first_end)
    deferral_of(task.run)
    stop_the_first_cluster(emulator)
    deferral_of(task.resume)  # resumed, as happens after each trigger timeout
    end_held()
    assert task.resume() == [[FILE], [OTHER_FILE]]
    assert supervisor.variables == {}


# Without a triggerer


@pytest.mark.usefixtures("deferring")
@pytest.mark.parametrize("has_ended", [True, False])
def test_a_task_whose_trigger_has_not_fired_waits_in_its_worker(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    has_ended: bool,
) -> None:
    task = TriedTask(ask_on_a_cluster_of_its_own)
    hold()
    deferral_of(task.run)
    if has_ended:
        end_held()
        assert task.resume_without_trigger() == [FILE]
    else:
        with once_it_is_looked_at(emulator, end_held):
            assert task.resume_without_trigger() == [FILE]
    [warning] = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert "No triggerer watches this task (Trigger timeout)" in warning
    assert "POLARS_CLOUD_DEFER=0" in warning
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("deferring")
def test_why_a_trigger_has_failed_is_logged(
    hold: Callable[[], None], end_held: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    task = TriedTask(ask)
    hold()
    deferral_of(task.run)
    end_held()
    lines = ["Traceback (most recent call last):\n", "ValueError: not a time\n"]
    assert task.resume_without_trigger("Trigger failure", traceback=lines) == [FILE]
    warnings = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert warnings[:2] == [line.rstrip() for line in lines]
    assert "(ValueError: not a time)" in warnings[2]


@pytest.mark.usefixtures("deferring")
def test_a_triggerer_without_the_library_causes_one_warning(
    hold: Callable[[], None], end_held: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    task = TriedTask(ask)
    hold()
    deferral_of(task.run)
    end_held()
    error = "ModuleNotFoundError: No module named 'polars_remote'"
    lines = ["Traceback (most recent call last):\n", '  File "x.py"\n    import y\n', f"{error}\n"]
    assert task.resume_without_trigger("Trigger failure", traceback=lines) == [FILE]
    [warning] = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith(f"No triggerer watches this task ({error}): it waits in its worker")


# Outlets


@pytest.mark.parametrize("where", ["in the worker", "deferred", "deferred, without its record"])
def test_the_extra_of_an_asset_event_survives(
    hold: Callable[[], None],
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    stock = Asset("stock", "s3://your-bucket/stock")

    def ask_and_tell() -> Any:
        events = get_current_context()["outlet_events"]
        events[REPORTS].extra = {"day": "2026-01-02", "rows": "many"}
        events[stock].extra["checked"] = True
        return ask()

    task = TriedTask(ask_and_tell, outlets=[REPORTS, stock])
    if where == "in the worker":
        task.run()
    else:
        monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)
        hold()
        deferred = deferral_of(task.run)
        if "without" in where:
            supervisor.variables.clear()
        resume_stored(task, deferred, {"results": RESULT})
    assert extra(task) == {"day": "2026-01-02", "location": [FILE], "rows": "many"}
    assert extra(task, stock) == {"checked": True, "location": [FILE], "rows": 2}


@pytest.mark.usefixtures("deferring")
def test_what_airflow_can_store_of_an_asset_survives(hold: Callable[[], None]) -> None:
    def ask_and_tell() -> Any:
        extra: Any = {"day": date(2026, 1, 2)}
        get_current_context()["outlet_events"][REPORTS].extra = extra
        return ask()

    task = TriedTask(ask_and_tell, outlets=[REPORTS])
    hold()
    deferral_of(task.run)
    task.resume({"results": RESULT})
    assert extra(task)["day"] == date(2026, 1, 2)


@pytest.mark.usefixtures("deferring")
def test_the_events_of_an_alias_and_of_partitions_survive(hold: Callable[[], None]) -> None:
    alias, other = AssetAlias("any"), Asset("other", "s3://your-bucket/other")

    def ask_and_tell() -> Any:
        events: Any = get_current_context()["outlet_events"]
        events[REPORTS].add_partitions(["north", "south"])
        events[alias].add(other, {"rows": 3})
        return ask()

    task = TriedTask(ask_and_tell, outlets=[REPORTS, alias])
    hold()
    deferral_of(task.run)
    task.resume({"results": RESULT})
    events = task.context["outlet_events"]
    assert events[REPORTS].partition_keys == {"north", "south"}
    [added] = events[alias].asset_alias_events
    assert (added.dest_asset_key.uri, added.extra) == (other.uri, {"rows": 3})


def test_a_task_without_outlets_has_no_events() -> None:
    task = TriedTask(ask)
    task.run()
    assert list(task.context["outlet_events"]) == []


# The link in the UI


def link(task: TriedTask) -> str:
    [link] = task.operator.operator_extra_links
    return str(link.get_link(task.operator, ti_key=task.ti))


def test_the_link_leads_to_the_query_after_a_success(emulator: RunningEmulator) -> None:
    task = TriedTask(ask)
    task.run()
    [query] = emulator.state()["queries"]
    assert link(task).startswith("https://")
    assert link(task).endswith(f"/queries/{query['id']}")


def test_the_link_opens_the_page_of_the_emulator(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    portal = emulator.environment["POLARS_CLOUD_PORTAL"]
    monkeypatch.setattr("polars_remote.cloud.queries.PORTAL", portal)
    task = TriedTask(ask)
    task.run()
    page = httpx.get(link(task), trust_env=False)
    assert page.status_code == 200
    assert f"<h1>{task.operator.task_id}</h1>" in page.text


@pytest.mark.usefixtures("deferring")
@pytest.mark.parametrize("has_results", [True, False])
def test_the_link_leads_to_the_query_while_the_task_is_deferred_and_afterwards(
    hold: Callable[[], None],
    end_held: Callable[[], None],
    emulator: RunningEmulator,
    has_results: bool,
) -> None:
    task = TriedTask(ask)
    hold()
    deferral_of(task.run)
    [query] = emulator.state()["queries"]
    page = link(task)
    assert page.endswith(f"/queries/{query['id']}")
    end_held()
    task.resume({"results": RESULT} if has_results else {})
    assert link(task) == page


def test_the_link_leads_to_a_query_that_has_failed(emulator: RunningEmulator) -> None:
    task = TriedTask(ask)
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: no such type")
    with pytest.raises(pl.exceptions.SchemaError):
        task.run()
    [query] = emulator.state()["queries"]
    assert link(task).endswith(f"/queries/{query['id']}")


@pytest.mark.parametrize("where", ["in the worker", "deferred", "resumed"])
def test_the_link_of_several_queries_leads_to_the_first_that_is_returned(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ids = []

    def ask(ctx: Any) -> Any:
        first, second = sink(ctx), sink(ctx, OTHER_FILE, ONE_ROW)
        ids.extend([get_query_id(second), get_query_id(first)])
        return [second, first]

    task = TriedTask(using(PAIR, ask))
    if where == "in the worker":
        task.run()
    else:
        monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)
        emulator.add_fault("SubmitQuery", "query_takes", times=2, seconds=HELD)
        deferral_of(task.run)
    if where == "resumed":
        task.resume({"results": RESULTS})
    assert link(task).endswith(f"/queries/{ids[0]}")


# DAG files


@query_task
@authenticate
def query_once() -> Query:
    raise NotImplementedError


@query_task(multiple_outputs=True, retries=3)
@authenticate(conn_id="nightly")
def query_region(region: str, *, factor: int = 1) -> dict[str, Any]:
    raise NotImplementedError


@pytest.fixture
def dag() -> DAG:
    """A DAG with each way to use the decorator."""
    with DAG("shop", schedule=None) as dag:
        query_region("North").set_upstream(query_once())
        query_once.override(task_id="overridden", retries=7, outlets=[REPORTS])()
        query_region.partial(factor=2).expand(region=["North", "South"])

        @task_group
        def regions() -> None:
            query_once()
            query_region.expand(region=["North", "South"])

        regions()

        @task_group
        def each_region(region: str) -> None:
            query_region(region)

        each_region.expand(region=["North", "South"])
    return dag


TASKS = {
    "query_once": False,
    "query_region": False,
    "overridden": False,
    "query_region__1": True,
    "regions.query_once": False,
    "regions.query_region": True,
    "each_region.query_region": False,
}


def test_each_way_to_use_the_decorator_keeps_the_link(dag: DAG) -> None:
    assert {each.task_id: each.is_mapped for each in dag.tasks} == TASKS
    for made in dag.tasks:
        assert [type(each) for each in made.operator_extra_links] == [QueryLink], made.task_id
        assert made.task_type == "QueryTask"
    tasks: dict[str, Any] = dict(dag.task_dict)
    assert (tasks["overridden"].retries, tasks["overridden"].outlets) == (7, [REPORTS])
    assert (tasks["query_region"].retries, tasks["query_region"].multiple_outputs) == (3, True)
    assert not tasks["query_once"].multiple_outputs


def test_each_way_to_use_the_decorator_reaches_the_ui_with_its_link(dag: DAG) -> None:
    in_ui = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    assert {each.task_id: each.is_mapped for each in in_ui.tasks} == TASKS
    for made in in_ui.tasks:
        assert [each.name for each in made.operator_extra_links] == ["Polars Cloud query"]
        assert made.operator_name == "@query_task"


@pytest.mark.usefixtures("deferring")
def test_a_mapped_task_is_deferred_and_resumed_by_its_own_index(
    hold: Callable[[], None],
    start_try: StartTry,
    supervisor: Supervisor,
) -> None:
    destinations = [FILE, OTHER_FILE]

    @query_task(task_id="run_query")
    @authenticate
    def ask_for(uri: str) -> Any:
        with use_cluster(PAIR, stop=False) as ctx:
            return sink(ctx, uri)

    def make(index: int) -> Any:
        with DAG("shop", schedule=None) as dag:
            ask_for.expand(uri=destinations)
        return dag.get_task("run_query").unmap({"op_kwargs": {"uri": destinations[index]}})

    tries, pages = [], []
    for index in (0, 1):
        hold()
        operator = make(index)
        with start_try(task=operator, map_index=index, scope=False, raises=TaskDeferred) as ti:
            tries.append(ti.id)
            operator.execute(get_current_context())
        pages.append(operator.query_page)
    assert len(entries(supervisor, "task")) == len(set(pages)) == 2
    for index, uri in enumerate(destinations):
        operator = make(index)
        event = {"results": {uri: {"location": [uri], "rows": 2}}}
        with start_try(task=operator, map_index=index, scope=False, resumes=tries[index]):
            resumed = operator.resume_execution("resume", {"event": event}, get_current_context())
        assert resumed == [uri]
        assert operator.query_page == pages[index]
    assert supervisor.variables == {}


def test_a_detached_query_that_is_returned_is_refused_and_runs_on(
    hold: Callable[[], None], end_held: Callable[[], None], emulator: RunningEmulator
) -> None:
    def ask() -> Any:
        with use_cluster(CLUSTER) as ctx:
            hold()
            query = sink(ctx)
            detach(query)
            return query

    with pytest.raises(QueryRefusedError, match="that was detached"):
        TriedTask(ask).run()
    end_held()
    assert query_statuses(emulator) == ["Success"]
