"""The worker processes of all clusters: one for each running query, limited by memory."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from polars_cloud_emulator.workers.handle import Worker

BYTES_PER_PROCESS = 256 * 2**20
FEWEST_PROCESSES = 4
MOST_PROCESSES = 64
"""Maximum of processes on any machine, because each starts several threads per core."""
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def processes_that_fit() -> int:
    """Return the number of worker processes that fit into the memory of machine or container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # not in a container, or without a limit
        memory = min(memory, int(CONTAINER_LIMIT.read_text()))
    return max(FEWEST_PROCESSES, min(memory // BYTES_PER_PROCESS, MOST_PROCESSES))


class WorkerPool:
    """Starts a process when a query needs one, and reuses it for the cluster's next query.

    Parameters
    ----------
    limit
        Maximum number of processes of all clusters together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._start: dict[UUID, Callable[[], Worker]] = {}
        self._busy: dict[Worker, UUID] = {}
        self._idle: dict[Worker, UUID] = {}
        """Idle workers and their clusters, longest idle first."""
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def is_busy(self) -> bool:
        """True if the maximum number of processes run queries."""
        return len(self._busy) >= self.limit

    def __contains__(self, cluster_id: UUID) -> bool:
        return cluster_id in self._start

    def pids(self, cluster_id: UUID) -> list[int]:
        return sorted(worker.pid for worker in self._of(cluster_id) if worker.pid)

    def open(self, cluster_id: UUID, start: Callable[[], Worker]) -> None:
        """Add a cluster, and start its first process if the limit is not reached."""
        self._start[cluster_id] = start
        if self._has_room():
            self._idle[start()] = cluster_id

    def take(self, cluster_id: UUID) -> Worker:
        """Return a worker for a query of the cluster. The pool must not be busy."""
        own = [worker for worker, owner in self._idle.items() if owner == cluster_id]
        if own:
            worker = own[-1]
            del self._idle[worker]
        else:
            if not self._has_room():
                self._end_longest_idle()
            worker = self._start[cluster_id]()
        self._busy[worker] = cluster_id
        return worker

    def give_back(self, worker: Worker) -> None:
        self._idle[worker] = self._busy.pop(worker)

    async def close(self, cluster_id: UUID) -> None:
        """End the cluster's processes, even if they run queries."""
        self._start.pop(cluster_id, None)
        workers = self._of(cluster_id)
        for worker in workers:
            self._busy.pop(worker, None)
            self._idle.pop(worker, None)
        await asyncio.gather(*(worker.close() for worker in workers))

    async def close_all(self) -> None:
        await asyncio.gather(*self._closing, *(self.close(cluster) for cluster in [*self._start]))

    def _of(self, cluster_id: UUID) -> list[Worker]:
        workers = [*self._busy.items(), *self._idle.items()]
        return [worker for worker, owner in workers if owner == cluster_id]

    def _has_room(self) -> bool:
        return len(self._busy) + len(self._idle) < self.limit

    def _end_longest_idle(self) -> None:
        worker = next(iter(self._idle))
        del self._idle[worker]
        closing = asyncio.create_task(worker.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
