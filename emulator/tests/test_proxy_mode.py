"""Queries through the control plane, and queries resumed by their id."""

from collections.abc import Callable
from concurrent.futures import Executor
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from emulator.tests.blocking_query import BlockingQuery
from emulator.tests.raw_calls import COMPUTE_PLANE
from polars_cloud_emulator.testing import RunningEmulator

StartCluster = Callable[..., Any]


@pytest.fixture
def context(start_cluster: StartCluster) -> Any:
    return start_cluster(connection_mode="proxy")


def test_query_runs_without_a_connection_to_the_scheduler(
    pc: ModuleType, emulator: RunningEmulator, context: Any
) -> None:
    target = "s3://your-bucket/x/"
    remote = pl.LazyFrame({"x": [1, 2]}).remote(context, priority=3).labels("nightly")
    query = remote.sink_parquet(target)
    result = query.await_result()
    assert type(query) is pc.ProxyQuery
    assert (result.status, result.n_rows_total) == (pc.QueryStatus.SUCCESS, 2)
    assert result.location == [f"{target}00000000.parquet"]
    assert pl.read_parquet(target)["x"].to_list() == [1, 2]
    [recorded] = emulator.state()["queries"]
    assert (recorded["labels"], recorded["priority"]) == (["nightly"], 3)
    assert not any(entry["path"].startswith(COMPUTE_PLANE) for entry in emulator.journal())


def test_failed_query_raises_the_exception_of_the_worker(pc: ModuleType, context: Any) -> None:
    query = pl.LazyFrame({"x": [1]}).select("nope").remote(context).execute(blocking=False)
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="nope"):
        query.await_result()
    assert query.get_status() is pc.QueryStatus.FAILED


def test_cancelled_query_is_returned_as_such(
    pc: ModuleType, context: Any, blocking: BlockingQuery, background: Executor
) -> None:
    query = blocking.lazy_frame().remote(context).execute(blocking=False)
    blocking.wait_for_start()
    assert query.get_status() is pc.QueryStatus.INPROGRESS
    waiting = background.submit(query.await_result)
    query.cancel()
    assert waiting.result().status is pc.QueryStatus.CANCELED


def test_direct_query_is_resumed_by_its_id(
    pc: ModuleType, start_cluster: StartCluster, blocking: BlockingQuery
) -> None:
    context = start_cluster()
    submitted = blocking.lazy_frame().remote(context).execute(blocking=False)
    query = pc.ProxyQuery(submitted._query_id, context.workspace.id)
    blocking.wait_for_start()
    assert query.get_status() is pc.QueryStatus.INPROGRESS
    blocking.release()
    result = query.await_result()
    assert (result.status, result.n_rows_total) == (pc.QueryStatus.SUCCESS, 3)
    assert result.location == submitted.await_result().location


def test_direct_query_is_cancelled_by_its_id(
    pc: ModuleType, start_cluster: StartCluster, blocking: BlockingQuery
) -> None:
    context = start_cluster()
    submitted = blocking.lazy_frame().remote(context).execute(blocking=False)
    pc.ProxyQuery(submitted._query_id, context.workspace.id).cancel()
    assert submitted.await_result().status is pc.QueryStatus.CANCELED


def test_cluster_takes_queries_in_its_own_mode_alone(
    pc: ModuleType, start_cluster: StartCluster, context: Any, emulator: RunningEmulator
) -> None:
    from polars_cloud.polars_cloud import DBClusterModeModel

    direct, frame = start_cluster(), pl.LazyFrame({"x": [1]})
    query = frame.remote(direct).execute(blocking=False)
    query.await_result()
    direct._connection_mode = DBClusterModeModel.Proxy
    with pytest.raises(RuntimeError, match="is in direct mode: submit to its scheduler"):
        frame.remote(direct).execute(blocking=False)

    context._connection_mode = DBClusterModeModel.Direct
    with pytest.raises(ValueError, match="has no open port"):
        frame.remote(context).execute(blocking=False)
    assert len(emulator.state()["queries"]) == 1


def test_unknown_query_is_not_found(pc: ModuleType) -> None:
    from uuid import uuid4

    from polars_cloud.polars_cloud import NotFoundError

    with pytest.raises(NotFoundError, match="does not exist"):
        pc.ProxyQuery(uuid4(), pc.Workspace("playground").id).get_status()
