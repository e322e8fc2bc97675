"""Each DAG, run with Airflow and the real client, and the Parquet files that it writes."""

import inspect
import re
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import boto3
import polars as pl
import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.models import Variable
from airflow.models.asset import AssetEvent
from airflow.sdk import DAG, DagRunState
from airflow.utils.session import create_session
from polars.testing import assert_frame_equal
from sqlalchemy import select

from local_airflow import PATTERNS, ROOT
from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import use_cluster
from polars_remote.waiting import deferral, in_triggerer
from tests.observed import cluster_statuses, query_statuses, variables
from tests.tries import Supervisor, kill

BUCKET = "your-bucket"
DATA = f"s3://{BUCKET}"
LEAVES_IT_TO_THE_IDLE_TIMEOUT = {"manifest_reuse", "single_query", "status_check"}

pytestmark = pytest.mark.usefixtures("airflow_db")

Tables = dict[str, pl.DataFrame]
REVENUE = (pl.col("quantity") * pl.col("unit_price")).sum()


@pytest.fixture(scope="module")
def dags() -> dict[str, DAG]:
    dags = DagBag(ROOT / "dags").dags
    for dag in dags.values():
        for task in dag.tasks:
            task.retries = 0  # an intended failure is not printed
    return dags


@pytest.fixture
def tables(emulator: RunningEmulator) -> Tables:
    return {name: pl.read_parquet(f"{DATA}/{name}/") for name in ("sales", "inventory", "returns")}


def single_query(t: Tables, day: date) -> Tables:
    completed = t["sales"].filter(pl.col("status") == "completed").drop_nulls("product")
    best = completed.group_by("product").agg(
        orders=pl.len(), units=pl.sum("quantity"), revenue=REVENUE
    )
    return {"results/single_query.parquet": best}


def status_check(t: Tables, day: date) -> Tables:
    counts = t["sales"].group_by("date", "status")
    return {
        "results/status_check.parquet": counts.agg(lines=pl.len(), orders=pl.n_unique("order_id"))
    }


def context_manager_shutdown(t: Tables, day: date) -> Tables:
    value = (pl.col("on_hand") * pl.col("unit_cost")).sum()
    stock = t["inventory"].group_by("date", "category").agg(units=pl.sum("on_hand"), value=value)
    return {"results/context_manager_shutdown.parquet": stock}


def manifest_reuse(t: Tables, day: date) -> Tables:
    refunds = t["returns"].group_by("reason")
    return {
        "results/manifest_reuse.parquet": refunds.agg(
            returns=pl.len(), units=pl.sum("quantity"), refund=pl.sum("refund")
        )
    }


def manual_shutdown(t: Tables, day: date) -> Tables:
    known = pl.col("customer_id").is_not_null()
    customers = (
        t["sales"].filter(pl.col("status") == "completed", known).group_by("customer_id")
    ).agg(spent=REVENUE)
    shelves = t["inventory"].group_by("region", "product")
    lowest = shelves.agg(lowest=pl.min("on_hand"), mean=pl.mean("on_hand"))
    return {
        "results/manual_shutdown/best_customers.parquet": customers.sort(
            "spent", "customer_id", descending=[True, False]
        ).head(100),
        "results/manual_shutdown/empty_shelves.parquet": lowest.sort(
            "lowest", "region", "product"
        ).head(100),
    }


def parallel_single_node(t: Tables, day: date) -> Tables:
    completed = t["sales"].filter(pl.col("status") == "completed").drop_nulls("product")
    return {
        f"results/parallel_single_node/{region}.parquet": completed.filter(
            pl.col("region") == region
        )
        .group_by("product")
        .agg(units=pl.sum("quantity"), revenue=REVENUE)
        for region in ("Centre", "East", "North", "South", "West")
    }


def multi_stage(t: Tables, day: date) -> Tables:
    clean = (
        t["sales"]
        .drop("sold_at")  # not a column of the schema
        .filter(pl.col("product").is_not_null(), pl.col("quantity") > 0, pl.col("status") != "?")
        .unique()
        .with_columns(pl.col("region").str.strip_chars().str.to_titlecase())
    )
    days = (
        clean.filter(pl.col("status") == "completed")
        .group_by("region", "date")
        .agg(orders=pl.n_unique("order_id"), revenue=REVENUE)
    )
    best = days.sort("revenue", "date", descending=[True, False]).group_by("region").head(3)
    return {
        "temporary result of clean_sales": clean,
        "temporary result of sum_days": days,
        "results/multi_stage.parquet": best,
    }


def complete_pipeline(t: Tables, day: date) -> Tables:
    sales, inventory, returns = (
        t[name].filter(pl.col("date") == day) for name in ("sales", "inventory", "returns")
    )
    clean = sales.unique().filter(
        pl.col("status") == "completed", pl.col("quantity") > 0, pl.col("product").is_not_null()
    )
    in_stock = inventory.group_by("category", "product").agg(
        on_hand=pl.sum("on_hand"), stock_value=(pl.col("on_hand") * pl.col("unit_cost")).sum()
    )
    sold = clean.group_by("product").agg(
        orders=pl.n_unique("order_id"), units=pl.sum("quantity"), revenue=REVENUE
    )
    returned = returns.group_by("product").agg(
        returned=pl.sum("quantity"), refunded=pl.sum("refund")
    )
    report = in_stock.join(sold, on="product", how="left").join(returned, on="product", how="left")
    amounts = ["orders", "units", "revenue", "returned", "refunded"]
    return {
        "temporary result of transform_inventory": in_stock,
        "temporary result of transform_sales": sold,
        "temporary result of transform_returns": returned,
        f"reports/daily/{day}.parquet": report.with_columns(
            pl.col(amounts).fill_null(0), date=pl.lit(day)
        ),
    }


EXPECTED: dict[str, Callable[[Tables, date], Tables]] = {
    function.__name__: function
    for function in (
        single_query,
        status_check,
        context_manager_shutdown,
        manifest_reuse,
        manual_shutdown,
        parallel_single_node,
        multi_stage,
        complete_pipeline,
    )
}


def all_ended(emulator: RunningEmulator) -> list[dict[str, Any]]:
    """Return the emulator's queries after the last of them has ended."""

    def ended() -> list[dict[str, Any]]:
        queries = emulator.state()["queries"]
        return queries if all(query["ended_at"] for query in queries) else []

    return eventually(ended)


def written_key(query: dict[str, Any]) -> str:
    """Return a query's destination below the shop's data, or the name of its temporary result."""
    [uri] = query["destinations"]
    if uri.startswith(f"{DATA}/"):
        return str(uri.removeprefix(f"{DATA}/"))
    labels = dict(label.split("=", 1) for label in query["labels"])
    return f"temporary result of {labels['task']}"


def live_clusters(emulator: RunningEmulator) -> int:
    return sum(cluster["stopped_at"] is None for cluster in emulator.state()["clusters"])


def find_last_event(asset: str) -> AssetEvent:
    with create_session() as session:
        events = select(AssetEvent).where(AssetEvent.asset.has(name=asset))
        event = session.scalars(events.order_by(AssetEvent.id.desc())).first()
    assert event is not None
    return event


def replace(name: str, table: pl.DataFrame) -> None:
    """Replace one of the shop's tables."""
    s3 = boto3.client("s3")
    for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{name}/")["Contents"]:
        s3.delete_object(Bucket=BUCKET, Key=entry["Key"])
    table.write_parquet(f"{DATA}/{name}/all.parquet")


@pytest.mark.parametrize("dag_id", PATTERNS)
def test_a_dag_succeeds_and_writes_what_the_same_query_gives_locally(
    dags: dict[str, DAG], emulator: RunningEmulator, tables: Tables, dag_id: str
) -> None:
    check_run(dags[dag_id], emulator, tables)


@pytest.mark.parametrize("dag_id", sorted(set(PATTERNS) & EXPECTED.keys()))
def test_a_dag_does_the_same_in_proxy_mode(
    dags: dict[str, DAG],
    emulator: RunningEmulator,
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
    dag_id: str,
) -> None:
    [cluster] = {id(each): each for each in map(find_cluster, dags[dag_id].tasks) if each}.values()
    monkeypatch.setitem(cluster, "connection_mode", "proxy")
    check_run(dags[dag_id], emulator, tables)
    assert not [call for call in emulator.journal() if "compute_plane" in call["path"]]


def find_cluster(task: Any) -> dict[str, Any] | None:
    """Return the constant `CLUSTER` of the task's DAG file."""
    function = inspect.unwrap(task.python_callable)
    cluster: dict[str, Any] | None = function.__globals__.get("CLUSTER")
    return cluster


def check_run(dag: DAG, emulator: RunningEmulator, tables: Tables) -> None:
    """Run the DAG, and compare its files with a local run of the same queries."""
    dag_id = dag.dag_id
    run = dag.test(logical_date=datetime.now(UTC))

    assert run.state == DagRunState.SUCCESS
    queries = all_ended(emulator)
    assert {query["status"] for query in queries} == {"Success"}
    for query in queries:
        names = [label.partition("=")[0] for label in query["labels"]]
        assert names[:4] == ["dag", "task", "run", "try"]
        assert query["labels"][0] == f"dag={dag_id}"
    assert emulator.state()["unmatched"] == []
    assert variables() == []
    if dag_id not in EXPECTED:  # a DAG of your own
        return
    assert live_clusters(emulator) == (dag_id in LEAVES_IT_TO_THE_IDLE_TIMEOUT)
    written = {written_key(query): query["destinations"] for query in queries}
    expected = EXPECTED[dag_id](tables, run.logical_date.date())
    assert written.keys() == expected.keys()
    for key, frame in expected.items():
        assert frame.height > 0
        assert_frame_equal(
            pl.read_parquet(written[key]), frame, check_row_order=False, check_column_order=False
        )


@pytest.mark.parametrize("dag_id", sorted(set(PATTERNS) & EXPECTED.keys() - {"single_query"}))
def test_a_failed_query_fails_the_run_with_its_own_exception_and_leaves_no_more_behind(
    dags: dict[str, DAG],
    emulator: RunningEmulator,
    tables: Tables,
    capfd: pytest.CaptureFixture[str],
    dag_id: str,
) -> None:
    for name, column in [("sales", "status"), ("inventory", "on_hand"), ("returns", "quantity")]:
        replace(name, tables[name].drop(column))

    run = dags[dag_id].test(logical_date=datetime.now(UTC))

    assert run.state == DagRunState.FAILED
    log = capfd.readouterr().out
    assert re.search(r"SchemaError.*missing columns", log)
    assert "Callback failed" not in log
    assert "Failed" in {query["status"] for query in all_ended(emulator)}
    assert variables() == []
    assert live_clusters(emulator) == (dag_id in LEAVES_IT_TO_THE_IDLE_TIMEOUT)


@pytest.mark.dag("complete_pipeline")
def test_a_date_with_a_time_of_day_gives_the_report_of_the_date(
    dags: dict[str, DAG], emulator: RunningEmulator, tables: Tables
) -> None:
    for name, table in tables.items():
        replace(name, table.with_columns(pl.col("date").cast(pl.Datetime("us")).dt.offset_by("9h")))

    run = dags["complete_pipeline"].test(logical_date=datetime.now(UTC))

    assert run.state == DagRunState.SUCCESS
    day = run.logical_date.date()
    file = f"reports/daily/{day}.parquet"
    report, expected = pl.read_parquet(f"{DATA}/{file}"), complete_pipeline(tables, day)[file]
    assert expected["revenue"].sum() > 0
    assert_frame_equal(report, expected, check_row_order=False, check_column_order=False)


@pytest.mark.dag("complete_pipeline")
@pytest.mark.parametrize("kind", [pl.String, pl.Int32])
def test_a_date_of_another_type_gives_no_report(
    dags: dict[str, DAG],
    emulator: RunningEmulator,
    tables: Tables,
    capfd: pytest.CaptureFixture[str],
    kind: type[pl.DataType],
) -> None:
    replace("sales", tables["sales"].with_columns(pl.col("date").cast(kind)))
    run = dags["complete_pipeline"].test(logical_date=datetime.now(UTC))
    assert run.state == DagRunState.FAILED
    assert "expected Datetime or Date, got" in capfd.readouterr().out
    assert "Failed" in {query["status"] for query in all_ended(emulator)}


@pytest.mark.dag("single_query")
def test_a_failed_query_does_not_fail_a_task_that_has_detached_it(
    dags: dict[str, DAG], emulator: RunningEmulator, tables: Tables
) -> None:
    replace("sales", tables["sales"].drop("status"))
    run = dags["single_query"].test(logical_date=datetime.now(UTC))
    assert run.state == DagRunState.SUCCESS
    assert [query["status"] for query in all_ended(emulator)] == ["Failed"]


@pytest.mark.dag("complete_pipeline")
def test_the_cluster_stops_only_after_the_siblings_of_a_failed_query_have_ended(
    dags: dict[str, DAG], emulator: RunningEmulator, tables: Tables
) -> None:
    replace("returns", tables["returns"].drop("quantity"))

    run = dags["complete_pipeline"].test(logical_date=datetime.now(UTC))

    states = {ti.task_id: ti.state for ti in run.get_task_instances()}
    assert states == {
        "start_cluster": "success",
        "transform_sales": "success",
        "transform_inventory": "success",
        "transform_returns": "failed",
        "build_report": "upstream_failed",
        "stop_cluster": "success",
    }
    assert run.state == DagRunState.FAILED
    [cluster] = emulator.state()["clusters"]
    assert max(query["ended_at"] for query in all_ended(emulator)) < cluster["stopped_at"]


@pytest.mark.dag("complete_pipeline")
def test_a_run_without_a_logical_date_reports_the_day_of_its_start(
    dags: dict[str, DAG], emulator: RunningEmulator, tables: Tables
) -> None:
    run = dags["complete_pipeline"].test(logical_date=None)

    assert run.state == DagRunState.SUCCESS
    assert run.logical_date is None
    report = pl.read_parquet(f"{DATA}/reports/daily/{run.run_after.date()}.parquet")
    assert report["date"].unique().to_list() == [run.run_after.date()]


@pytest.mark.dag("complete_pipeline")
def test_the_report_is_announced_as_an_asset_with_date_rows_and_location(
    dags: dict[str, DAG], emulator: RunningEmulator
) -> None:
    run = dags["complete_pipeline"].test(logical_date=datetime.now(UTC))
    event = find_last_event("daily_report")
    day = run.logical_date.date()
    report = f"{DATA}/reports/daily/{day}.parquet"
    rows = pl.read_parquet(report).height
    assert (event.source_run_id, event.extra) == (
        run.run_id,
        {"date": str(day), "rows": rows, "location": [report]},
    )


@pytest.mark.dag("complete_pipeline")
def test_the_cost_of_a_run_is_logged_returned_and_announced_as_the_emulator_bills_it(
    dags: dict[str, DAG], emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "polars_remote")
    run = dags["complete_pipeline"].test(logical_date=datetime.now(UTC))
    assert run.state == DagRunState.SUCCESS
    [cluster] = emulator.state()["clusters"]
    [stop] = [ti for ti in run.get_task_instances() if ti.task_id == "stop_cluster"]
    [cost] = returned = stop.xcom_pull("stop_cluster")
    assert find_last_event("daily_report_cost").extra == {"cost": returned}
    [line] = [text for each in caplog.records if "Cost of" in (text := each.getMessage())]
    assert line == (
        f"Cost of cluster {cluster['id']} of manifest airflow-complete-pipeline in run "
        f"{run.run_id} of complete_pipeline: 3 nodes, 6 vCPUs, {cost['minutes']} min, "
        f"{cost['vcpu_hours']} vCPU-hours"
    )
    assert 60 * cost["minutes"] == pytest.approx(cluster["billed_seconds"], abs=0.1)
    node_hours = 3 * cluster["billed_seconds"] / 3600
    assert cost["vcpu_hours"] == pytest.approx(2 * node_hours, abs=1e-4)


@pytest.mark.dag("complete_pipeline")
def test_tasks_that_are_deferred_hand_over_and_announce_the_same(
    dags: dict[str, DAG],
    emulator: RunningEmulator,
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "polars_remote")
    monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)
    monkeypatch.setattr(deferral, "LONGEST_RESUME_DELAY", 0.0)
    sweeps = []
    monkeypatch.setattr(in_triggerer, "FIRST_SWEEP_SECONDS", 0.0)
    monkeypatch.setattr(in_triggerer, "end_orphans", lambda **options: sweeps.append(options) or [])
    emulator.add_fault("SubmitQuery", "query_takes", seconds=2, times=4)
    run = dags["complete_pipeline"].test(logical_date=datetime.now(UTC))
    assert run.state == DagRunState.SUCCESS
    assert caplog.text.count("Deferred until query") == 4
    assert sweeps == []  # a second thread would disturb `dag.test()`
    day = run.logical_date.date()
    file = f"reports/daily/{day}.parquet"
    report = pl.read_parquet(f"{DATA}/{file}")
    expected = complete_pipeline(tables, day)[file]
    assert_frame_equal(report, expected, check_row_order=False, check_column_order=False)
    event = find_last_event("daily_report")
    assert event.extra == {
        "date": str(day),
        "rows": report.height,
        "location": [f"{DATA}/{file}"],
    }
    assert variables() == []
    assert live_clusters(emulator) == 0


@pytest.mark.dag("complete_pipeline")
def test_running_a_day_again_replaces_exactly_that_days_report(
    dags: dict[str, DAG], emulator: RunningEmulator, tables: Tables
) -> None:
    pipeline = dags["complete_pipeline"]
    today = datetime.now(UTC)
    yesterday = today - timedelta(days=1)

    def run_and_read(*days: datetime) -> list[pl.DataFrame]:
        for day in days:
            assert pipeline.test(logical_date=day).state == DagRunState.SUCCESS
        return [
            pl.read_parquet(f"{DATA}/reports/daily/{day.date()}.parquet")
            for day in (yesterday, today)
        ]

    old_yesterday, old_today = run_and_read(yesterday, today)
    replace("sales", tables["sales"].filter(pl.col("order_id") % 2 == 0))
    new_yesterday, new_today = run_and_read(yesterday)

    assert old_yesterday["date"].unique().to_list() == [yesterday.date()]
    assert new_yesterday.height == old_yesterday.height
    assert new_yesterday["revenue"].sum() < old_yesterday["revenue"].sum()
    assert_frame_equal(new_today, old_today)
    reports = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="reports/daily/")
    assert reports["KeyCount"] == 2


def test_end_orphans_ends_what_a_run_has_left_that_is_gone(
    dags: dict[str, DAG], emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    def submit() -> Iterator[None]:
        cluster = {"name": "airflow-shop", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}
        with use_cluster(cluster) as ctx:
            pl.LazyFrame({"number": [1]}).remote(ctx).single_node().execute(blocking=False)
            yield

    emulator.add_fault("SubmitQuery", "query_waits", seconds=3600)
    kill(submit)
    assert query_statuses(emulator) == ["Scheduled"]
    with create_session() as session:
        for key, value in supervisor.variables.items():
            session.add(Variable(key=key, val=value))  # noqa: AIR311

    assert dags["end_orphans"].test().state == DagRunState.SUCCESS
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert variables() == []
