"""Iceberg sinks: a task appends its rows once, even if its query is submitted twice."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from pyiceberg.catalog.sql import SqlCatalog

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import use_cluster
from polars_remote.cloud.client import get_cluster_id, get_query_id
from polars_remote.cloud.plans import Table, read_plan
from polars_remote.errors import QueryRefusedError
from polars_remote.ownership.end import find_recorded
from polars_remote.ownership.record import QueryRecord
from polars_remote.ownership.scope import current_scope
from tests.observed import calls, query_statuses
from tests.test_queries import make_plan, stop_cluster
from tests.tries import StartTry, Supervisor, TriedTask, kill

TABLE = "shop.sales"
LOCATION = "s3://your-bucket/warehouse/shop/sales"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})
REQUIREMENTS = "pyiceberg[pyarrow,sql-sqlite]\n"

Append = Callable[..., Any]


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, Any]:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(REQUIREMENTS)
    return {"name": "shop", "cpus": 2, "memory": 4, "requirements": str(requirements)}


@pytest.fixture
def catalog(emulator: RunningEmulator, tmp_path: Path) -> Iterator[SqlCatalog]:
    """A catalog file with one empty table, which the emulator's workers can open."""
    catalog = SqlCatalog(
        "shop",
        uri=f"sqlite:///{tmp_path}/catalog.db",
        warehouse="s3://your-bucket/warehouse",
        **{
            "s3.endpoint": os.environ["AWS_ENDPOINT_URL"],
            "s3.access-key-id": os.environ["AWS_ACCESS_KEY_ID"],
            "s3.secret-access-key": os.environ["AWS_SECRET_ACCESS_KEY"],
            "s3.region": os.environ["AWS_REGION"],
        },
    )
    catalog.create_namespace("shop")
    catalog.create_table(TABLE, TWO_ROWS.collect().to_arrow().schema)
    yield catalog
    catalog.close()


@pytest.fixture
def append(catalog: SqlCatalog) -> Append:
    """Submit an append, of two rows by default."""

    def append(ctx: Any, frame: pl.LazyFrame = TWO_ROWS) -> Any:
        remote = frame.remote(ctx).single_node()
        return remote.sink_iceberg(TABLE, mode="append", catalog=catalog)

    return append


def height(catalog: SqlCatalog) -> int:
    count: int = catalog.load_table(TABLE).scan().to_arrow().num_rows
    return count


def sink_uuids(catalog: SqlCatalog) -> list[str]:
    summaries = [each.summary for each in catalog.load_table(TABLE).snapshots()]
    return [each["polars.sink-uuid"] for each in summaries if each]


@pytest.mark.parametrize(
    ("mode", "is_appended_to"), [("append", True), ("overwrite", False)], ids=["append", "replace"]
)
def test_the_table_of_a_sink_is_read_from_its_plan(
    catalog: SqlCatalog, mode: Any, is_appended_to: bool
) -> None:
    from polars.io.iceberg._sink import IcebergSinkState

    sink = IcebergSinkState.new(TABLE, mode=mode, catalog=catalog)
    plan = read_plan(make_plan(sink.attach_sink(TWO_ROWS)))
    assert plan.tables == (Table(TABLE, is_appended_to, sink.sink_uuid_str),)
    assert (plan.destinations, plan.has_location) == ((), False)


@pytest.mark.usefixtures("pc")
def test_an_iceberg_sink_appends_and_overwrites(
    catalog: SqlCatalog, cluster: dict[str, Any], start_try: StartTry
) -> None:
    heights = []
    for number, (mode, target) in enumerate(
        [("append", TABLE), ("append", catalog.load_table(TABLE)), ("overwrite", TABLE)]
    ):
        with start_try(run_id=f"manual__{number}"), use_cluster(cluster, stop=False) as ctx:
            remote: Any = TWO_ROWS.remote(ctx).single_node()
            result = remote.sink_iceberg(target, mode=mode, catalog=catalog).await_result()
        assert (result.location, result.n_rows_total) == ([LOCATION], 2)
        heights.append(height(catalog))
    assert heights == [2, 4, 2]


@pytest.mark.usefixtures("pc")
def test_a_query_task_that_appends_returns_the_tables_location(
    catalog: SqlCatalog,
    append: Append,
    cluster: dict[str, Any],
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("polars_remote.waiting.deferral.IN_WORKER_SECONDS", 60.0)

    def run_query() -> Any:
        with use_cluster(cluster, stop=False) as ctx:
            return append(ctx)

    assert TriedTask(run_query).run() == [LOCATION]
    assert height(catalog) == 2
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("mode", ["append", "overwrite"])
@pytest.mark.parametrize("kind", ["answer_lost", "connection_reset"])
def test_rows_are_written_once_if_the_reply_to_the_submission_is_lost(
    emulator: RunningEmulator,
    catalog: SqlCatalog,
    cluster: dict[str, Any],
    start_try: StartTry,
    kind: str,
    mode: Any,
) -> None:
    with start_try(), use_cluster(cluster, stop=False) as ctx:
        emulator.add_fault("SubmitQuery", kind)
        remote: Any = TWO_ROWS.remote(ctx).single_node()
        remote.sink_iceberg(TABLE, mode=mode, catalog=catalog).await_result()
        eventually(lambda: {*query_statuses(emulator)} == {"Success"})
    assert len(query_statuses(emulator)) == (2 if kind == "answer_lost" else 1)
    assert height(catalog) == 2


def append_as_somebody_else(pc: ModuleType, emulator: RunningEmulator, append: Append) -> None:
    cluster = emulator.state()["clusters"][-1]
    append(pc.ComputeContext.connect(cluster["id"], workspace="playground"), TWO_ROWS.head(1))


def test_another_tasks_append_is_not_mistaken_for_the_one_whose_reply_was_lost(
    pc: ModuleType,
    emulator: RunningEmulator,
    catalog: SqlCatalog,
    append: Append,
    cluster: dict[str, Any],
    start_try: StartTry,
) -> None:
    def append_another_tasks() -> None:
        eventually(lambda: calls(emulator, "SubmitQuery") == 1)
        append_as_somebody_else(pc, emulator, append)
        emulator.clear_faults()  # the first submission's connection is reset

    with start_try(), use_cluster(cluster, stop=False) as ctx:
        emulator.add_fault("SubmitQuery", "stall")
        with ThreadPoolExecutor() as background:
            other = background.submit(append_another_tasks)
            ours = append(ctx)
        other.result()
        ours.await_result()
        eventually(lambda: {*query_statuses(emulator)} == {"Success"})
    assert height(catalog) == 3


def test_another_tasks_append_is_not_mistaken_for_that_of_a_killed_worker(
    pc: ModuleType,
    emulator: RunningEmulator,
    append: Append,
    cluster: dict[str, Any],
    start_try: StartTry,
) -> None:
    """A worker is killed before the reply to its submission arrives."""
    with start_try(), use_cluster(cluster, stop=False) as ctx:
        TWO_ROWS.remote(ctx).single_node().execute()
        append_as_somebody_else(pc, emulator, append)
        submitted = QueryRecord(cluster_id=get_cluster_id(ctx) or "", manifest="shop", known=[])
        assert find_recorded(current_scope().session, TABLE, submitted) is None


@pytest.mark.usefixtures("pc")
def test_a_task_that_fails_after_its_append_does_not_append_again(
    catalog: SqlCatalog,
    append: Append,
    cluster: dict[str, Any],
    start_try: StartTry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "polars_remote")
    with start_try(raises=KeyError, match="mine"), use_cluster(cluster, stop=False) as ctx:
        append(ctx).await_result()
        raise KeyError("mine")
    with start_try(2), use_cluster(cluster, stop=False) as ctx:
        assert append(ctx).await_result().location == [LOCATION]
    assert height(catalog) == 2
    [sink_uuid] = sink_uuids(catalog)
    assert f"Snapshot of {TABLE} has polars.sink-uuid {sink_uuid}" in caplog.text


@pytest.mark.usefixtures("pc")
def test_a_killed_workers_append_is_resumed(
    emulator: RunningEmulator,
    catalog: SqlCatalog,
    append: Append,
    cluster: dict[str, Any],
    start_try: StartTry,
) -> None:
    def body() -> Iterator[str]:
        with use_cluster(cluster, stop=False) as ctx:
            yield get_query_id(append(ctx))

    query_id = kill(body)
    with start_try(2), use_cluster(cluster, stop=False) as ctx:
        query = append(ctx)
        query.await_result()
    assert get_query_id(query) == query_id
    assert (height(catalog), query_statuses(emulator)) == (2, ["Success"])


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("is_cleared", [False, True], ids=["retried", "cleared while it ran"])
def test_an_append_whose_cluster_and_worker_have_died_is_not_repeated(
    emulator: RunningEmulator,
    catalog: SqlCatalog,
    append: Append,
    cluster: dict[str, Any],
    start_try: StartTry,
    is_cleared: bool,
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(cluster, stop=False) as ctx:
            append(ctx)
            eventually(lambda: height(catalog) == 2)
            stop_cluster(emulator, ctx)
            yield

    kill(body)
    with start_try(2, clear_number=int(is_cleared)), use_cluster(cluster, stop=False) as ctx:
        append(ctx).await_result()
    assert height(catalog) == 2


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize(
    "place",
    [
        {"task_id": "other"},
        {"map_index": 1},
        {"run_id": "manual__2"},
        {"dag_id": "other"},
        {"max_tries": 7},
        {"run_start": None},
    ],
    ids=["task", "map index", "run", "DAG", "cleared", "run of the same id"],
)
def test_another_task_and_a_cleared_task_append_again(
    catalog: SqlCatalog,
    append: Append,
    cluster: dict[str, Any],
    start_try: StartTry,
    place: dict[str, Any],
) -> None:
    with start_try(map_index=0), use_cluster(cluster, stop=False) as ctx:
        append(ctx).await_result()
    with start_try(2, **{"map_index": 0, **place}), use_cluster(cluster, stop=False) as ctx:
        append(ctx).await_result()
    assert height(catalog) == 4


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("mode", ["append", "overwrite"])
def test_a_task_does_not_write_to_a_table_twice(
    catalog: SqlCatalog,
    append: Append,
    cluster: dict[str, Any],
    start_try: StartTry,
    mode: Any,
) -> None:
    with start_try(), use_cluster(cluster, stop=False) as ctx:
        append(ctx).await_result()
        remote: Any = TWO_ROWS.remote(ctx).single_node()
        with pytest.raises(QueryRefusedError, match=f"of the same task writes to {TABLE}"):
            remote.sink_iceberg(TABLE, mode=mode, catalog=catalog)
    assert height(catalog) == 2
