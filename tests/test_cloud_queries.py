"""`cloud/queries.py`: a submitted query is found while its cluster is live."""

from types import ModuleType
from typing import Any
from uuid import uuid4

import polars as pl
import pytest

from polars_cloud_emulator.model.workspace import WORKSPACE_ID
from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote.cloud.client import connect_query, get_cluster_id, get_query_id
from polars_remote.cloud.queries import (
    cancel_query,
    describe,
    find_live_cluster,
    find_new_query,
    find_query,
    find_status,
    get_page,
)
from polars_remote.cloud.session import CloudSession
from tests.observed import calls, query_statuses

FILE = "s3://your-bucket/results/one.parquet"

pytestmark = pytest.mark.usefixtures("supervisor")


@pytest.fixture
def session(pc: ModuleType) -> CloudSession:
    return CloudSession("polars_cloud")


def start_cluster(pc: ModuleType) -> Any:
    ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    ctx.start()
    return ctx


@pytest.fixture
def ctx(pc: ModuleType) -> Any:
    return start_cluster(pc)


@pytest.fixture
def query(ctx: Any, emulator: RunningEmulator) -> Any:
    """A query that runs until it is canceled."""
    emulator.add_fault("SubmitQuery", "query_hangs")
    return submit(ctx)


def submit(ctx: Any) -> Any:
    return pl.LazyFrame({"x": [1]}).remote(ctx).single_node().sink_parquet(FILE)


# Clusters


def test_a_live_cluster_is_found(session: CloudSession, ctx: Any) -> None:
    found = find_live_cluster(session, str(get_cluster_id(ctx)))
    assert found is not None
    assert get_cluster_id(found) == get_cluster_id(ctx)
    assert found.get_status().is_available()


def test_a_stopped_cluster_is_not_found(session: CloudSession, ctx: Any) -> None:
    cluster_id = str(get_cluster_id(ctx))
    ctx.stop()
    assert find_live_cluster(session, cluster_id) is None


def test_an_unknown_cluster_is_not_found(session: CloudSession) -> None:
    assert find_live_cluster(session, str(uuid4())) is None


@pytest.mark.usefixtures("short_outages")
def test_not_to_reach_polars_cloud_is_an_error(
    session: CloudSession, ctx: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GET compute/{id}", "answer_lost", times=1_000)
    with pytest.raises(RuntimeError, match="error sending request"):
        find_live_cluster(session, str(get_cluster_id(ctx)))


# Queries


def test_a_query_is_found_by_its_id(session: CloudSession, query: Any, ctx: Any) -> None:
    cluster_id, query_id = str(get_cluster_id(ctx)), get_query_id(query)
    found = find_query(session, cluster_id, query_id, "not asked for", [])
    assert found is not None
    assert get_query_id(found) == query_id


def test_a_query_without_an_id_is_the_one_with_its_destination_that_was_not_known_before(
    session: CloudSession, query: Any, ctx: Any
) -> None:
    cluster_id, query_id = str(get_cluster_id(ctx)), get_query_id(query)
    found = find_query(session, cluster_id, None, FILE, [])
    assert found is not None
    assert get_query_id(found) == query_id
    assert find_query(session, cluster_id, None, FILE, [query_id]) is None
    assert find_query(session, cluster_id, None, f"{FILE}/", []) is None


def test_a_query_without_an_id_and_a_destination_is_not_searched(
    session: CloudSession, ctx: Any, emulator: RunningEmulator
) -> None:
    pl.LazyFrame({"x": [1]}).remote(ctx).execute()
    asked_so_far = calls(emulator, "query")
    assert find_query(session, str(get_cluster_id(ctx)), None, "", []) is None
    assert calls(emulator, "query") == asked_so_far


def test_of_two_queries_with_a_destination_the_one_that_was_not_known_is_new(
    session: CloudSession, ctx: Any
) -> None:
    first, second = submit(ctx), submit(ctx)
    for known, new in ((first, second), (second, first)):
        assert find_new_query(session, ctx, FILE, [get_query_id(known)]) == get_query_id(new)
    assert find_new_query(session, ctx, FILE, [get_query_id(first), get_query_id(second)]) is None


def test_a_query_on_another_cluster_is_not_mistaken_for_it(
    session: CloudSession, query: Any, pc: ModuleType
) -> None:
    other = start_cluster(pc)
    assert find_query(session, str(get_cluster_id(other)), None, FILE, []) is None


def test_a_query_whose_cluster_has_stopped_is_not_found(
    session: CloudSession, query: Any, ctx: Any
) -> None:
    cluster_id = str(get_cluster_id(ctx))
    ctx.stop()
    assert find_query(session, cluster_id, get_query_id(query), FILE, []) is None


def test_a_query_that_its_cluster_does_not_know_has_no_status(
    session: CloudSession, ctx: Any, emulator: RunningEmulator
) -> None:
    unknown = connect_query(str(uuid4()), ctx)
    assert find_status(session, unknown) is None
    cancel_query(session, unknown)
    assert calls(emulator, "CancelQuery") == 0


def test_a_status_that_is_refused_is_an_error(
    session: CloudSession, query: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "grpc_error", code="PERMISSION_DENIED", message="no")
    with pytest.raises(RuntimeError, match="no"):
        find_status(session, query)


# The end


def test_a_canceled_query_has_ended(
    session: CloudSession, query: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    cancel_query(session, query)
    assert query_statuses(emulator) == ["Canceled"]
    assert f"Canceled query {describe(query)}" in caplog.text


def test_a_query_that_has_ended_is_not_canceled(
    session: CloudSession, query: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    query.cancel()
    cancel_query(session, query)
    assert calls(emulator, "CancelQuery") == 1
    assert "Canceled" not in caplog.text


def test_a_query_that_somebody_else_has_canceled_has_ended(
    session: CloudSession, ctx: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    query = submit(ctx)
    emulator.call("POST", f"query/{get_query_id(query)}/cancel")
    cancel_query(session, query)
    assert query_statuses(emulator) == ["Canceled"]
    assert calls(emulator, "CancelQuery") == 0


def test_a_query_whose_status_is_not_known_is_canceled(
    session: CloudSession, query: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "connection_reset")
    cancel_query(session, query)
    assert query_statuses(emulator) == ["Canceled"]


@pytest.mark.parametrize("kind", ["connection_reset", "answer_lost"])
def test_a_cancel_that_does_not_arrive_or_has_no_answer_is_repeated(
    session: CloudSession, query: Any, emulator: RunningEmulator, kind: str
) -> None:
    emulator.add_fault("CancelQuery", kind)
    cancel_query(session, query)
    assert query_statuses(emulator) == ["Canceled"]


@pytest.mark.usefixtures("short_outages")
def test_a_cancel_that_never_arrives_is_an_error(
    session: CloudSession, query: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.add_fault("CancelQuery", "connection_reset", times=1_000)
    # The client sends all calls over one connection, so the reset can hit the status call.
    with pytest.raises((TimeoutError, RuntimeError), match=r"still running|transport error"):
        cancel_query(session, query)
    eventually(lambda: query_statuses(emulator) == ["InProgress"])
    assert "Canceled" not in caplog.text


def test_a_query_is_described_by_its_id_and_last_by_its_page(query: Any, ctx: Any) -> None:
    query_id = get_query_id(query)
    assert get_page(query).startswith("https://")
    assert get_page(query).endswith(
        f"/portal/{WORKSPACE_ID}/{get_cluster_id(ctx)}/queries/{query_id}"
    )
    assert describe(query) == f"{query_id} {get_page(query)}"
