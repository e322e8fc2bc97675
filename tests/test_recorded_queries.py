"""`recorded_queries.py`: a query that is on record is found as long as its cluster is live."""

from types import ModuleType
from typing import Any
from uuid import uuid4

import polars as pl
import pytest

from include.polars_remote.client_internals import connect_query, get_cluster_id, get_query_id
from include.polars_remote.clusters import compute_context
from include.polars_remote.recorded_queries import (
    describe,
    end_query,
    end_recorded_query,
    find_live_cluster,
    find_query,
    find_status,
)
from polars_cloud_emulator.testing import RunningEmulator
from polars_cloud_emulator.workspace import WORKSPACE_ID
from tests.observed import calls, query_statuses

FILE = "s3://your-bucket/results/one.parquet"


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    """The log tells what it tells in Airflow."""
    caplog.set_level("INFO", "include")


@pytest.fixture
def ctx(pc: ModuleType) -> Any:
    ctx = compute_context({"name": "shop", "cpus": 2, "memory": 4})
    ctx.start()
    return ctx


@pytest.fixture
def query(ctx: Any, emulator: RunningEmulator) -> Any:
    """A query that runs until it is canceled."""
    emulator.add_fault("SubmitQuery", "query_hangs")
    return pl.LazyFrame({"x": [1]}).remote(ctx).single_node().sink_parquet(FILE)


# Clusters


def test_a_live_cluster_is_found(ctx: Any) -> None:
    found = find_live_cluster(get_cluster_id(ctx))
    assert found is not None
    assert get_cluster_id(found) == get_cluster_id(ctx)
    assert found.get_status().is_available()


def test_a_stopped_cluster_is_not_found(ctx: Any) -> None:
    cluster_id = get_cluster_id(ctx)
    ctx.stop()
    assert find_live_cluster(cluster_id) is None


@pytest.mark.usefixtures("pc")
def test_an_unknown_cluster_is_not_found() -> None:
    assert find_live_cluster(str(uuid4())) is None


@pytest.mark.usefixtures("short_outages")
def test_not_to_reach_polars_cloud_is_an_error(ctx: Any, emulator: RunningEmulator) -> None:
    emulator.add_fault("GET compute/{id}", "answer_lost", times=1_000)
    with pytest.raises(RuntimeError, match="error sending request"):
        find_live_cluster(get_cluster_id(ctx))


# Queries


def test_a_query_is_found_by_its_id(query: Any, ctx: Any) -> None:
    record = {"cluster_id": get_cluster_id(ctx), "query_id": get_query_id(query), "known": []}
    found = find_query("not asked for", record)
    assert found is not None
    assert get_query_id(found) == get_query_id(query)


def test_a_query_without_an_id_is_the_one_with_its_destination_that_was_not_known_before(
    query: Any, ctx: Any
) -> None:
    record: dict[str, Any] = {"cluster_id": get_cluster_id(ctx), "known": []}
    found = find_query(FILE, record)
    assert found is not None
    assert get_query_id(found) == get_query_id(query)
    assert find_query(FILE, {**record, "known": [get_query_id(query)]}) is None
    assert find_query(f"{FILE}/", record) is None


def test_a_query_on_another_cluster_is_not_taken_for_it(query: Any, pc: ModuleType) -> None:
    other = compute_context({"name": "warehouse", "cpus": 2, "memory": 4})
    other.start()
    assert find_query(FILE, {"cluster_id": get_cluster_id(other), "known": []}) is None


def test_a_query_whose_cluster_has_stopped_is_not_found(query: Any, ctx: Any) -> None:
    record = {"cluster_id": get_cluster_id(ctx), "query_id": get_query_id(query), "known": []}
    ctx.stop()
    assert find_query(FILE, record) is None
    assert end_recorded_query(FILE, record)


def test_a_query_that_its_cluster_does_not_know_has_no_status(ctx: Any) -> None:
    unknown = connect_query(str(uuid4()), ctx)
    assert find_status(unknown) is None
    assert end_query(unknown)


def test_a_status_that_is_refused_is_an_error(query: Any, emulator: RunningEmulator) -> None:
    emulator.add_fault("GetQueryStatus", "grpc_error", code="PERMISSION_DENIED", message="no")
    with pytest.raises(RuntimeError, match="no"):
        find_status(query)


def test_a_canceled_query_has_ended(
    query: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    assert end_query(query)
    assert query_statuses(emulator) == ["Canceled"]
    assert f"Canceled query {describe(query)}" in caplog.text


def test_a_query_that_has_ended_is_not_canceled(
    query: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    query.cancel()
    assert end_query(query)
    assert calls(emulator, "CancelQuery") == 1
    assert "Canceled" not in caplog.text


@pytest.mark.usefixtures("short_outages")
def test_a_cancel_that_fails_is_logged_and_not_raised(
    query: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.add_fault("CancelQuery", "connection_reset", times=1_000)
    assert not end_query(query)
    assert f"Query {describe(query)} could not be canceled" in caplog.text


def test_a_query_is_described_by_its_id_and_its_page(query: Any, ctx: Any) -> None:
    query_id = get_query_id(query)
    page = f"portal/{WORKSPACE_ID}/{get_cluster_id(ctx)}/queries/{query_id}"
    assert describe(query).startswith(f"{query_id} (https://")
    assert describe(query).endswith(f"/{page})")
