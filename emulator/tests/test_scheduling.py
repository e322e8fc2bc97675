"""Scheduling of queries: order, workers, cancels, stops and failures."""

import itertools
import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from emulator.tests.blocking_query import BlockingQuery
from emulator.tests.processes import is_running
from emulator.tests.raw_calls import COMPUTE_PLANE
from polars_cloud_emulator.testing import RunningEmulator, eventually

StartCluster = Callable[..., Any]


def submit(lf: pl.LazyFrame, context: Any, *, distributed: bool = False, priority: int = 0) -> Any:
    remote = lf.remote(context, priority=priority)
    remote = remote.distributed() if distributed else remote.single_node()
    return remote.execute(blocking=False)


def short(context: Any, **options: Any) -> Any:
    return submit(pl.LazyFrame({"x": [1]}), context, **options)


def recorded(emulator: RunningEmulator, query: Any) -> dict[str, Any]:
    [found] = [q for q in emulator.state()["queries"] if q["id"] == str(query._query_id)]
    return found


def workers(emulator: RunningEmulator) -> list[int]:
    return emulator.state()["clusters"][-1]["worker_pids"]


@pytest.fixture
def another_blocking(tmp_path: Path) -> BlockingQuery:
    return BlockingQuery(tmp_path / "another")


def test_queries_wait_for_the_worker_in_the_order_of_priority_and_submission(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
) -> None:
    context = start_cluster(cluster_size=1)
    running = submit(blocking.lazy_frame(), context)
    blocking.wait_for_start()
    first, second = short(context), short(context)
    later, urgent = short(context, priority=-1), short(context, priority=5)
    waiting = [urgent, first, second, later]
    assert running.get_status() is pc.QueryStatus.INPROGRESS
    assert {query.get_status() for query in waiting} == {pc.QueryStatus.SCHEDULED}

    blocking.release()
    for query in waiting:
        assert query.await_result().status is pc.QueryStatus.SUCCESS
    spans = [recorded(emulator, query) for query in [running, *waiting]]
    for before, after in itertools.pairwise(spans):
        assert before["ended_at"] <= after["started_at"]


def test_single_node_queries_run_side_by_side(
    start_cluster: StartCluster, blocking: BlockingQuery, another_blocking: BlockingQuery
) -> None:
    context = start_cluster(cluster_size=2)
    queries = [submit(b.lazy_frame(), context) for b in (blocking, another_blocking)]
    blocking.wait_for_start()
    another_blocking.wait_for_start()
    blocking.release()
    another_blocking.release()
    assert [query.await_result().n_rows_total for query in queries] == [3, 3]


def test_distributed_query_takes_the_whole_cluster(
    pc: ModuleType, start_cluster: StartCluster, blocking: BlockingQuery
) -> None:
    context = start_cluster(cluster_size=2)
    distributed = submit(blocking.lazy_frame(), context, distributed=True)
    blocking.wait_for_start()
    single = short(context)
    assert single.get_status() is pc.QueryStatus.SCHEDULED
    blocking.release()
    assert single.await_result().status is pc.QueryStatus.SUCCESS
    assert distributed.get_status() is pc.QueryStatus.SUCCESS


def test_distributed_query_takes_no_more_workers_than_it_may(
    pc: ModuleType, start_cluster: StartCluster, blocking: BlockingQuery
) -> None:
    context = start_cluster(cluster_size=2)
    remote = blocking.lazy_frame().remote(context).distributed(max_workers=1)
    distributed = remote.execute(blocking=False)
    blocking.wait_for_start()
    assert short(context).await_result().status is pc.QueryStatus.SUCCESS
    blocking.release()
    assert distributed.await_result().status is pc.QueryStatus.SUCCESS


def test_distributed_query_starts_with_the_free_workers_and_takes_those_that_become_free(
    pc: ModuleType,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
    another_blocking: BlockingQuery,
) -> None:
    context = start_cluster(cluster_size=2)
    single = submit(blocking.lazy_frame(), context)
    blocking.wait_for_start()
    distributed = submit(another_blocking.lazy_frame(), context, distributed=True)
    another_blocking.wait_for_start()
    behind = short(context)
    blocking.release()
    assert single.await_result().status is pc.QueryStatus.SUCCESS
    assert behind.get_status() is pc.QueryStatus.SCHEDULED
    another_blocking.release()
    assert behind.await_result().status is pc.QueryStatus.SUCCESS
    assert distributed.get_status() is pc.QueryStatus.SUCCESS


@pytest.mark.parametrize("min_workers", [2, 3, 2**32 - 1])
def test_distributed_query_waits_for_as_many_of_its_min_workers_as_there_are(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
    min_workers: int,
) -> None:
    context = start_cluster(cluster_size=2)
    submit(blocking.lazy_frame(), context)
    blocking.wait_for_start()
    remote = pl.LazyFrame({"x": [1]}).remote(context).distributed(min_workers=min_workers)
    waiting, behind = remote.execute(blocking=False), short(context)
    assert waiting.get_status() is pc.QueryStatus.SCHEDULED
    assert behind.get_status() is pc.QueryStatus.SCHEDULED, "it overtakes none"
    blocking.release()
    assert behind.await_result().status is pc.QueryStatus.SUCCESS
    ended = recorded(emulator, waiting)["ended_at"]
    assert ended <= recorded(emulator, behind)["started_at"]


@pytest.mark.parametrize(
    "workers",
    [
        {"min_workers": 0},
        {"max_workers": 0},
        {"min_workers": -1},
        {"min_workers": 3, "max_workers": 2},
    ],
)
def test_client_refuses_numbers_of_workers_that_cannot_be(
    emulator: RunningEmulator, start_cluster: StartCluster, workers: dict[str, int]
) -> None:
    context = start_cluster()
    with pytest.raises((ValueError, OverflowError)):
        pl.LazyFrame({"x": [1]}).remote(context).distributed(**workers).execute()
    assert emulator.state()["queries"] == []


def test_wait_is_one_request_until_the_end(
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
    background: Executor,
) -> None:
    query = submit(blocking.lazy_frame(), start_cluster())
    blocking.wait_for_start()
    waiting = background.submit(query.await_result)
    # The journal gets the status when the response is sent.
    query.get_status()
    assert not waiting.done()
    blocking.release()
    assert waiting.result().n_rows_total == 3
    path = f"{COMPUTE_PLANE}/GetQueryResult"
    [call] = [entry for entry in emulator.journal() if entry["path"] == path]
    assert call["grpc_status"] == 0


def test_wait_ends_at_its_time_limit_and_the_query_continues(
    pc: ModuleType,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query = submit(blocking.lazy_frame(), start_cluster())
    with monkeypatch.context() as limited:
        limited.setenv("POLARS_TIMEOUT_MS", "1500")
        with pytest.raises(TimeoutError):
            query.await_result()
    assert query.get_status() is pc.QueryStatus.INPROGRESS
    blocking.release()
    assert query.await_result().status is pc.QueryStatus.SUCCESS


def test_cancelling_ends_that_query_only_and_replaces_its_worker(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
    another_blocking: BlockingQuery,
    background: Executor,
) -> None:
    context = start_cluster(cluster_size=2)
    cancelled = submit(blocking.lazy_frame(), context)
    going_on = submit(another_blocking.lazy_frame(), context)
    blocking.wait_for_start()
    another_blocking.wait_for_start()
    before = workers(emulator)
    waiting = background.submit(cancelled.await_result)

    cancelled.cancel()
    result = waiting.result()
    assert (result.status, result.location) == (pc.QueryStatus.CANCELED, [])
    assert cancelled.get_status() is pc.QueryStatus.CANCELED
    assert going_on.get_status() is pc.QueryStatus.INPROGRESS
    eventually(lambda: sum(map(is_running, before)) == 1)
    eventually(lambda: len(set(workers(emulator)) | set(before)) == 3)

    assert short(context).await_result().status is pc.QueryStatus.SUCCESS
    another_blocking.release()
    assert going_on.await_result().status is pc.QueryStatus.SUCCESS
    cancelled.cancel()
    going_on.cancel()
    assert going_on.get_status() is pc.QueryStatus.SUCCESS


def test_cancelled_query_that_waited_never_runs_and_lets_the_next_one_pass(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
) -> None:
    context = start_cluster(cluster_size=2)
    submit(blocking.lazy_frame(), context)
    blocking.wait_for_start()
    remote = pl.LazyFrame({"x": [1]}).remote(context).distributed(min_workers=2)
    waiting, behind = remote.execute(blocking=False), short(context)
    waiting.cancel()
    assert behind.await_result().status is pc.QueryStatus.SUCCESS
    assert waiting.await_result().status is pc.QueryStatus.CANCELED
    assert recorded(emulator, waiting)["started_at"] is None


def test_stopping_the_cluster_fails_what_runs_and_what_waits(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
    background: Executor,
) -> None:
    context = start_cluster(cluster_size=1)
    running = submit(blocking.lazy_frame(), context)
    queued = short(context)
    blocking.wait_for_start()
    waits = [background.submit(query.await_result) for query in (running, queued)]
    context.stop()
    for wait in waits:
        with pytest.raises(RuntimeError, match=r"^cluster was stopped$"):
            wait.result()
    assert {q["status"] for q in emulator.state()["queries"]} == {"Failed"}
    assert workers(emulator) == []


def test_worker_that_is_killed_fails_its_query_and_is_replaced(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
    background: Executor,
) -> None:
    context = start_cluster(cluster_size=1)
    waiting = background.submit(submit(blocking.lazy_frame(), context).await_result)
    blocking.wait_for_start()
    [pid] = workers(emulator)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker process died with SIGKILL"):
        waiting.result()
    assert short(context).await_result().status is pc.QueryStatus.SUCCESS
    assert workers(emulator) != [pid]
    assert context.get_status() is pc.ComputeContextStatus.IDLE


def test_worker_that_exits_is_distinguished_from_a_killed_one(
    start_cluster: StartCluster,
) -> None:
    def leave(df: pl.DataFrame) -> pl.DataFrame:
        import os

        os._exit(3)

    context = start_cluster()
    with pytest.raises(RuntimeError, match="worker process died with exit code 3"):
        submit(pl.LazyFrame({"x": [1]}).map_batches(leave), context).await_result()
    assert short(context).await_result().n_rows_total == 1


def test_idle_worker_that_dies_is_replaced(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    context = start_cluster(cluster_size=1)
    short(context).await_result()
    [pid] = workers(emulator)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: workers(emulator) not in ([], [pid]))
    assert short(context).await_result().n_rows_total == 1


def test_channel_carries_more_than_a_thousand_calls(start_cluster: StartCluster) -> None:
    query = short(start_cluster())
    query.await_result()
    for _ in range(1010):
        assert query.get_status().is_done()
