"""What docs/published-examples.md says of Polars Cloud's own examples is so with today's client."""

import json
import re
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING

import polars as pl
import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG, DagRunState

from include.shop import MANIFEST
from local_airflow import PATTERNS, ROOT
from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote.settings import WORKSPACE
from tests.observed import cluster_statuses, query_statuses

if TYPE_CHECKING:
    from polars_cloud import ComputeContext

PAGE = ROOT / "docs" / "published-examples.md"
PUBLISHED = ROOT / "benchmarks" / "published_wiring"
BUNDLE = {
    "name": PUBLISHED.name,
    "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
    "kwargs": {"path": str(PUBLISHED)},
}
DIRECTORY = "s3://your-bucket/published/"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})


@pytest.fixture
def ctx(pc: ModuleType) -> "ComputeContext":
    ctx: ComputeContext = pc.ComputeContext(workspace=WORKSPACE, cpus=2, memory=4, cluster_size=1)
    return ctx


@pytest.fixture
def manifest(pc: ModuleType) -> None:
    """The manifest that the examples take for granted."""
    pc.ComputeContext(workspace=WORKSPACE, cpus=2, memory=4, cluster_size=3).register(MANIFEST)


@pytest.fixture
def published(airflow_db: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, DAG]:
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST", json.dumps([BUNDLE]))
    dags = DagBag(PUBLISHED).dags
    for dag in dags.values():
        for task in dag.tasks:
            task.retries = 0
    return dags


def test_the_page_names_each_dag_and_each_of_these_tests() -> None:
    page = PAGE.read_text()
    assert set(PATTERNS) == set(re.findall(r"\]\(\.\./dags/(\w+)\.py\)", page))
    named = set(re.findall(r"`(test_\w+)`", page))
    here = {name for name in globals() if name.startswith("test_")}
    assert here - named == {"test_the_page_names_each_dag_and_each_of_these_tests"}
    emulator = "".join(file.read_text() for file in (ROOT / "emulator" / "tests").glob("test_*.py"))
    assert [name for name in named - here if f"def {name}(" not in emulator] == []


def test_count_needs_a_column() -> None:
    with pytest.raises(TypeError, match=r"please use `pl.len\(\)` instead"):
        pl.count()


def test_execute_waits_and_its_result_cannot_be_awaited(
    pc: ModuleType, ctx: "ComputeContext", emulator: RunningEmulator
) -> None:
    result = TWO_ROWS.remote(ctx).execute()
    assert query_statuses(emulator) == ["Success"]
    assert isinstance(result, pc.QueryResult)
    assert not hasattr(result, "await_result")


def test_a_result_has_a_status_and_no_get_status(pc: ModuleType, ctx: "ComputeContext") -> None:
    result = TWO_ROWS.remote(ctx).sink_parquet(DIRECTORY).await_result()
    assert result.status == pc.QueryStatus.SUCCESS
    assert not hasattr(result, "get_status")


def test_await_result_raises_the_error_of_a_failed_query(
    ctx: "ComputeContext", emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: no such type")
    query = TWO_ROWS.remote(ctx).sink_parquet(DIRECTORY)
    with pytest.raises(pl.exceptions.SchemaError, match="no such type"):
        query.await_result()


def test_a_canceled_query_has_an_empty_list_as_its_location(
    pc: ModuleType, ctx: "ComputeContext", emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = TWO_ROWS.remote(ctx).sink_parquet(DIRECTORY)
    query.cancel()
    result = query.await_result()
    assert result.status == pc.QueryStatus.CANCELED
    assert result.location == []


def test_stop_raises_when_no_cluster_runs(pc: ModuleType, manifest: None) -> None:
    ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
    with pytest.raises(RuntimeError, match="nothing to stop"):
        ctx.stop()


def test_leaving_a_context_without_a_cluster_replaces_the_error_of_its_block(
    ctx: "ComputeContext",
) -> None:
    with pytest.raises(RuntimeError, match="nothing to stop"), ctx:
        raise ValueError("the user's own error")


def test_a_manifest_is_registered_once(manifest: None, ctx: "ComputeContext") -> None:
    with pytest.raises(ValueError, match=MANIFEST):
        ctx.register(MANIFEST)


def test_a_run_is_green_although_its_queries_failed(
    manifest: None, published: dict[str, DAG], emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", times=3, error="SchemaError: no such type")

    run = published["published_complete_pipeline"].test()

    assert query_statuses(emulator) == ["Failed"] * 3
    assert run.state == DagRunState.SUCCESS


@pytest.mark.parametrize("dag_id", ["parallel_single_node", "multi_stage"])
def test_a_cluster_that_nobody_stops_idles_for_an_hour(
    manifest: None, published: dict[str, DAG], emulator: RunningEmulator, dag_id: str
) -> None:
    assert published[f"published_{dag_id}"].test().state == DagRunState.SUCCESS
    eventually(lambda: set(query_statuses(emulator)) == {"Success"})

    emulator.advance_clock(timedelta(minutes=59))
    assert cluster_statuses(emulator) == ["Idle"]
    emulator.advance_clock(timedelta(minutes=2))
    eventually(lambda: cluster_statuses(emulator) == ["Stopped"])
