"""Explanations of a query's plan, with and without running the query."""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import httpx
import polars as pl
import pytest

from emulator.tests.blocking_query import BlockingQuery
from emulator.tests.processes import none_running
from emulator.tests.raw_calls import WORKSPACE
from polars_cloud_emulator.testing import RunningEmulator, eventually

StartCluster = Callable[..., Any]

NO_OPTIMIZATION = pl.QueryOptFlags.none()
TARGET = "s3://your-bucket/plans/"


def large_sales() -> pl.LazyFrame:
    sales = pl.scan_parquet("s3://your-bucket/sales/")
    return sales.filter(pl.col("quantity") > 2).group_by("region").agg(pl.len())


def written(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Return the plan that the client sends."""
    return frame.sink_parquet(TARGET, lazy=True)


def test_explained_plan_equals_that_of_polars(start_cluster: StartCluster) -> None:
    frame, remote = large_sales(), large_sales().remote(start_cluster())
    assert remote.explain(plan_stage="ir") == written(frame).explain()
    unchanged = remote.single_node().explain(plan_stage="ir", optimizations=NO_OPTIMIZATION)
    assert unchanged == written(frame).explain(optimizations=NO_OPTIMIZATION)
    assert "FILTER" in unchanged
    assert "FILTER" not in written(frame).explain()


def test_plan_of_a_query_that_ran_equals_that_of_polars(
    pc: Any, start_cluster: StartCluster
) -> None:
    context, frame = start_cluster(), large_sales()
    result = frame.remote(context).execute()
    graph = written(frame).show_graph(raw_output=True, plan_stage="ir")
    assert result.graph("ir", raw_output=True, show=False) == graph
    query = pc.spawn(frame, dst=TARGET, context=context, plan_type="plain")
    query.await_result()
    assert query.plan("ir") == written(frame).explain()


@pytest.mark.parametrize(
    "ask",
    [
        lambda context: large_sales().remote(context).explain(),
        lambda context: large_sales().remote(context).execute(blocking=False).plan(),
        lambda context: large_sales().remote(context).execute().graph(),
    ],
    ids=["explain", "plan", "graph"],
)
def test_physical_plan_is_refused_with_a_clear_error(
    start_cluster: StartCluster, ask: Callable[[Any], Any]
) -> None:
    expected = "no physical plan, because one worker runs the whole query; request the"
    with pytest.raises((pl.exceptions.ComputeError, RuntimeError), match=expected):
        ask(start_cluster())


def test_explaining_waits_for_no_worker(
    emulator: RunningEmulator, start_cluster: StartCluster, blocking: BlockingQuery
) -> None:
    context = start_cluster()
    running = blocking.lazy_frame().remote(context).execute(blocking=False)
    blocking.wait_for_start()
    waiting = pl.LazyFrame({"x": [1]}).remote(context)
    waiting.execute(blocking=False)
    assert "DF" in pl.LazyFrame({"x": [1]}).remote(context).explain(plan_stage="ir")
    assert [query["status"] for query in emulator.state()["queries"]] == [
        "InProgress",
        "Scheduled",
        "Success",
    ]
    blocking.release()
    running.await_result()


def test_query_that_is_only_planned_writes_nothing(
    pc: Any, rest: httpx.Client, start_cluster: StartCluster
) -> None:
    query = pc.spawn(large_sales(), dst=TARGET, context=start_cluster(), execute_until="ir")
    result = query.await_result()
    assert (result.location, result.n_rows_total, result.head) == ([], None, None)
    with pytest.raises(pl.exceptions.ComputeError, match="expanded paths were empty"):
        pl.read_parquet(f"{TARGET}*.parquet")
    kept = rest.get(f"{WORKSPACE}/query/{query._query_id}").json()
    assert (kept["execute_until"], kept["output_location"]) == ("OptimizeIr", None)


def test_plan_is_optimized_in_proxy_mode(pc: Any, start_cluster: StartCluster) -> None:
    context = start_cluster(connection_mode="proxy")
    query = pc.spawn(large_sales(), dst=TARGET, context=context, execute_until="ir")
    assert query.await_result().status is pc.QueryStatus.SUCCESS


def test_plan_that_cannot_be_optimized_raises_the_error_of_polars(
    start_cluster: StartCluster,
) -> None:
    context = start_cluster()
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="nope"):
        large_sales().select("nope").remote(context).explain(plan_stage="ir")
    with pytest.raises(FileNotFoundError, match="No such file"):
        pl.scan_parquet("here.parquet").remote(context).explain(plan_stage="ir")


def test_large_frame_is_explained_and_forgotten(start_cluster: StartCluster) -> None:
    context, frame = start_cluster(), pl.LazyFrame({"x": range(100_000)})
    assert 'DF ["x"]' in frame.remote(context).explain(plan_stage="ir")
    result = frame.remote(context).execute()
    with pytest.raises(RuntimeError, match="The plan was not stored: it is large"):
        result.graph("ir", raw_output=True, show=False)


@pytest.mark.parametrize("end", ["cancel", "stop"])
def test_planning_ends_with_its_query_and_its_cluster(
    emulator: RunningEmulator, start_cluster: StartCluster, background: Executor, end: str
) -> None:
    context = start_cluster()
    emulator.add_fault("SubmitQuery", "query_hangs")
    frame = pl.LazyFrame({"x": [1]}).remote(context)
    explained = background.submit(frame.explain, plan_stage="ir")
    eventually(lambda: [q["status"] for q in emulator.state()["queries"]] == ["InProgress"])
    if end == "cancel":
        [query] = emulator.state()["queries"]
        [pid] = eventually(lambda: emulator.state()["clusters"][0]["worker_pids"])
        emulator.call("POST", f"query/{query['id']}/cancel")
        eventually(lambda: none_running([pid]))
    else:
        context.stop()
        with pytest.raises(RuntimeError, match="cluster was stopped"):
            explained.result()
        assert emulator.state()["clusters"][0]["worker_pids"] == []


def test_plan_shows_no_storage_options(
    emulator: RunningEmulator, pc: Any, start_cluster: StartCluster
) -> None:
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    options = {name.lower(): emulator.environment[name] for name in keys}
    options["user_agent"] = "a-secret-of-the-user"
    sales = pl.scan_parquet("s3://your-bucket/sales/", storage_options=options)
    dst = pc.ParquetDst(TARGET, storage_options=options)
    query = pc.spawn(sales, dst=dst, context=start_cluster(), plan_type="plain")
    query.await_result()
    page = httpx.get(
        f"{emulator.rest_url}/portal/{query._cluster.workspace.id}/{query._cluster._compute_id}"
        f"/queries/{query._query_id}",
        trust_env=False,
        timeout=60,
    )
    for text in (query.plan("ir"), page.text):
        assert "Parquet SCAN [s3://your-bucket/sales/" in text
        assert "of-the-user" not in text
        assert options["aws_secret_access_key"] not in text
