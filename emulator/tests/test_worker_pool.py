"""The limit of worker processes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from emulator.tests.blocking_query import BlockingQuery
from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_cloud_emulator.workers import pool
from polars_cloud_emulator.workers.pool import WorkerPool, processes_that_fit

GIB = 2**30


class NoProcess:
    """A worker without a process."""

    def __init__(self, started: list[UUID], cluster_id: UUID) -> None:
        started.append(cluster_id)
        self.closed = False

    async def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("memory", "processes"),
    [("1073741824", 4), ("3221225472", 12), ("1", 4), (str(2**60), 64)],
)
def test_memory_of_the_container_bounds_the_worker_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: str, processes: int
) -> None:
    monkeypatch.setattr(pool.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 999 * GIB}.get)
    monkeypatch.setattr(pool, "CONTAINER_LIMIT", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text(memory)
    assert processes_that_fit() == processes


def test_memory_of_the_machine_bounds_the_worker_processes_outside_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pool.os, "sysconf", {"SC_PAGE_SIZE": GIB, "SC_PHYS_PAGES": 5}.get)
    monkeypatch.setattr(pool, "CONTAINER_LIMIT", tmp_path / "none")
    assert processes_that_fit() == 20


def test_two_hundred_clusters_start_no_more_processes_than_fit() -> None:
    started: list[UUID] = []
    clusters = [uuid4() for _ in range(200)]

    async def open_all() -> None:
        workers = WorkerPool(3)
        for cluster_id in clusters:
            workers.open(cluster_id, lambda id_=cluster_id: NoProcess(started, id_))  # type: ignore[misc]
        assert started == clusters[:3]
        idle: list[Any] = list(workers._idle)

        mine: Any = workers.take(clusters[1])
        assert mine is idle[1], "a process of the cluster is reused"
        workers.take(clusters[-1])
        workers.take(clusters[-1])
        await asyncio.sleep(0)
        assert [each.closed for each in idle] == [True, False, True], "idle ones made room"
        assert workers.is_busy

        workers.give_back(mine)
        workers.take(clusters[5])
        await asyncio.sleep(0)
        assert mine.closed
        await workers.close_all()

    asyncio.run(open_all())
    assert started == [*clusters[:3], clusters[-1], clusters[-1], clusters[5]]


def test_queries_of_all_clusters_wait_for_the_worker_processes_that_fit(
    emulator_here: Callable[..., RunningEmulator],
    run_client: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("polars_cloud_emulator.server.processes_that_fit", lambda: 2)
    emulator = emulator_here()
    blocking = [BlockingQuery(tmp_path / str(number)) for number in range(4)]
    run_client(
        emulator.environment,
        f"""
from pathlib import Path
from emulator.tests.blocking_query import BlockingQuery
for number in range(4):
    if number < 3:
        ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4, cluster_size=50)
        ctx.start()
    lf = BlockingQuery(Path({str(tmp_path)!r}) / str(number)).lazy_frame()
    lf.remote(ctx).single_node().execute(blocking=False)
""",
    )

    def statuses() -> list[str]:
        return [query["status"] for query in emulator.state()["queries"]]

    def processes() -> int:
        return sum(len(cluster["worker_pids"]) for cluster in emulator.state()["clusters"])

    for each in blocking[:2]:
        each.wait_for_start()
    assert statuses() == ["InProgress", "InProgress", "Scheduled", "Scheduled"]
    assert processes() == 2
    blocking[1].release()
    blocking[2].wait_for_start()
    assert statuses() == ["InProgress", "Success", "InProgress", "Scheduled"]
    assert processes() == 2
    first, *_ = emulator.state()["clusters"]
    emulator.call("POST", f"compute/{first['id']}/stop")
    blocking[3].wait_for_start()
    assert statuses() == ["Failed", "Success", "InProgress", "InProgress"]
    for each in blocking:
        each.release()
    eventually(lambda: statuses() == ["Failed", "Success", "Success", "Success"])
    assert capfd.readouterr().err.count("All 2 worker processes, the maximum") == 1
