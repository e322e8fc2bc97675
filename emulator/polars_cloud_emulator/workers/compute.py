"""Execution of queries on worker processes, as the state schedules them."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.faults.kinds import (
    ClusterLost,
    QueryFails,
    QueryFault,
    QueryHangs,
    QueryTakes,
    QueryWaits,
    StartupFails,
    StartupFault,
    StartupTakes,
    WorkerKilled,
)
from polars_cloud_emulator.model.clusters import Cluster, TerminationReason
from polars_cloud_emulator.model.errors import CannotPersist, InvalidRequest
from polars_cloud_emulator.model.jobs import Failure, Hold, Job, PlanFormat, Reply, Success
from polars_cloud_emulator.model.queries import Query
from polars_cloud_emulator.model.realism import Realism
from polars_cloud_emulator.model.state import State
from polars_cloud_emulator.storage.persisted_plans import PersistedPlans
from polars_cloud_emulator.storage.persisted_state import PersistedState
from polars_cloud_emulator.workers.handle import Worker
from polars_cloud_emulator.workers.isolated_python import worker_environment
from polars_cloud_emulator.workers.plan_text import PlanText, explain
from polars_cloud_emulator.workers.pool import WorkerPool
from polars_cloud_emulator.workers.requirements import declared_distributions

NO_PLAN = "The plan was not stored: it is large, or has Python scans, which may contain secrets"
TICK = timedelta(milliseconds=50)
"""Poll interval for start-ups, delayed queries and idle timeouts."""


@dataclass
class Lease:
    """Resources of a running query: a number of workers, and the process that runs the query."""

    query: Query
    workers: int
    worker: Worker


class Compute:
    """Runs the queries of all live clusters on worker processes.

    Parameters
    ----------
    plans
        Plans of the queries.
    environment
        Environment variables of the object store.
    temporary_uri
        Prefix for results without a destination.
    delete_result
        Deletes the result without a destination of a query; called in a thread.
    realism
        Start-up time of clusters, lifetime of results and names of files.
    max_processes
        Maximum number of worker processes of all clusters together.
    """

    def __init__(
        self,
        state: State,
        clock: Clock,
        persisted: PersistedState,
        *,
        plans: PersistedPlans,
        environment: Mapping[str, str],
        temporary_uri: str,
        delete_result: Callable[[UUID], None],
        realism: Realism,
        max_processes: int,
    ) -> None:
        self._state = state
        self._clock = clock
        self._persisted = persisted
        self._plans = plans
        self._realism = realism
        self.environment = {**worker_environment(), **environment}
        """Environment variables of a worker, besides those of its cluster."""
        self._temporary_uri = temporary_uri
        self._delete_result = delete_result
        self._workers = WorkerPool(max_processes)
        self._has_logged_limit = False
        self._leases: dict[UUID, Lease] = {}
        self._ended: dict[UUID, asyncio.Event] = {}
        self._faults: dict[UUID, QueryFault] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._expired: set[UUID] = set()

    def worker_pids(self, cluster_id: UUID) -> list[int]:
        return self._workers.pids(cluster_id)

    def start(self, begin: Callable[[], Cluster], fault: StartupFault | None = None) -> Cluster:
        """Start the cluster that ``begin`` returns, unless it is running already.

        Raises
        ------
        CannotPersist
            The start cannot be written to disk; nothing was started.
        """
        with self._persisted.transaction(self._state):
            cluster = begin()
            is_new = cluster.id not in self._workers
            distributions = self._prepare_start(cluster, fault) if is_new else None
        if distributions is not None:
            self._launch(cluster, distributions)
        return cluster

    def _prepare_start(
        self, cluster: Cluster, fault: StartupFault | None = None
    ) -> set[str] | None:
        """Return the distributions that the workers can import; None if the start fails."""
        match fault:
            case StartupFails(message=message):
                self._fail_to_start(cluster, message)
                return None
            case StartupTakes(seconds=seconds):
                self._state.clusters.postpone(cluster, timedelta(seconds=seconds))
        try:
            return declared_distributions(cluster.spec.requirements_txt)
        except InvalidRequest as error:
            self._fail_to_start(cluster, str(error))
            return None

    def _launch(self, cluster: Cluster, distributions: set[str]) -> None:
        """Start the cluster's first process."""
        environment = {**self.environment, **cluster.spec.env_vars}

        def give_up(reason: str) -> None:
            self._run_in_background(
                self._stop_by_itself(cluster.id, TerminationReason.FAILED, reason)
            )

        self._workers.open(cluster.id, lambda: Worker(environment, give_up, distributions))

    def _relaunch(self, cluster: Cluster) -> None:
        try:
            self._state.clusters.check(cluster.spec)
        except InvalidRequest as error:
            self._fail_to_start(cluster, str(error))
        else:
            distributions = self._prepare_start(cluster)
            if distributions is not None:
                self._launch(cluster, distributions)
        if not cluster.is_live:
            print(
                f"Cluster {cluster.id} failed to restart: {cluster.termination_message}",
                file=sys.stderr,
            )

    def _fail_to_start(self, cluster: Cluster, reason: str) -> None:
        self._state.begin_stop(cluster, TerminationReason.FAILED, reason)
        self._state.clusters.end_stop(cluster)

    async def stop(self, cluster_id: UUID) -> None:
        """Stop a cluster at its user's request.

        Raises
        ------
        CannotPersist
            The stop cannot be written to disk; the cluster was not stopped.
        """
        cluster = self._state.clusters.find(cluster_id)
        with self._persisted.transaction(self._state):
            has_begun = self._state.begin_stop(cluster, TerminationReason.STOPPED_BY_USER)
        if has_begun:
            await self._finish_stop(cluster)

    async def _stop_by_itself(
        self, cluster_id: UUID, reason: TerminationReason, message: str
    ) -> None:
        cluster = self._state.clusters.find(cluster_id)
        if self._state.begin_stop(cluster, reason, message):
            await self._finish_stop(cluster)

    async def _finish_stop(self, cluster: Cluster) -> None:
        self._notify_waiters()
        await self._end_workers(cluster.id)
        self._state.clusters.end_stop(cluster)
        self._start_queries(self._state.queries.waiting_clusters())

    def submit(self, begin: Callable[[], Query], fault: QueryFault | None = None) -> Query:
        """Queue the query that ``begin`` returns.

        Raises
        ------
        CannotPersist
            The query cannot be written to disk; it was not submitted.
        """
        with self._persisted.transaction(self._state):
            query = begin()
            if isinstance(fault, QueryWaits):
                self._state.queries.hold_back(query, timedelta(seconds=fault.seconds))
        if fault is not None and not isinstance(fault, QueryWaits):
            self._faults[query.id] = fault
        self._queue(query)
        return query

    def _queue(self, query: Query) -> None:
        self._ended[query.id] = asyncio.Event()
        self._start_queries([query.cluster_id])

    def cancel(self, query_id: UUID) -> None:
        """Cancel a query at its user's request.

        Raises
        ------
        CannotPersist
            The cancel cannot be written to disk; the query was not canceled.
        """
        with self._persisted.transaction(self._state):
            self._state.cancel(query_id)
        self._notify_waiters()
        if query_id in self._leases:
            self._leases[query_id].worker.kill()
        else:
            self._start_queries([self._state.queries.find(query_id).cluster_id])

    async def delete_result(self, query_id: UUID) -> None:
        """Delete the query's result, unless the query named a destination."""
        await asyncio.to_thread(self._delete_result, self._state.queries.find(query_id).id)

    async def plan_text(self, query: Query, plan_format: PlanFormat) -> PlanText:
        """Return Polars' explanation of a query's plan; the optimized plan has this format."""
        path = self._plans.best_path(query.id)
        if path is None:
            return PlanText(error=NO_PLAN)
        # Without the cluster's own variables, because some make Python execute code.
        return await explain(
            path, self.environment, plan_format, query.engine, query.optimization_flags
        )

    async def wait_for_end(self, query_id: UUID, timeout: float) -> bool:
        """Wait for the query's end; return whether it ended within ``timeout`` seconds."""
        query = self._state.queries.find(query_id)
        if not query.has_ended:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended[query_id].wait(), timeout)
        return query.has_ended

    def release_waiters(self) -> None:
        """Make every ``wait_for_end`` return now."""
        for event in self._ended.values():
            event.set()

    def resume(self) -> None:
        """Resume the clusters and queries of a restored state.

        A cluster that cannot start again fails, for example if Polars was upgraded meanwhile.
        """
        for cluster in self._state.clusters.by_id.values():
            if cluster.is_live:
                self._relaunch(cluster)
        queries = self._state.queries.by_id.values()
        self._plans.delete_all_but(
            active=(query.id for query in queries if not query.has_ended),
            ended=(query.id for query in queries if query.has_ended),
        )
        for query in queries:
            if not query.has_ended:
                self._queue(query)

    async def watch_clock(self) -> None:
        """Handle start-ups, delayed queries, idle timeouts and expired results, until canceled."""
        while True:
            ready = self._state.clusters.become_ready()
            self._start_queries([*ready, *self._state.queries.end_waits()])
            for cluster_id in self._state.clusters.idle_too_long():
                await self._stop_by_itself(
                    cluster_id, TerminationReason.STOPPED_INACTIVE, "idle timeout"
                )
            forgotten = self._state.forget_oldest()
            for query_id in forgotten:
                self._plans.delete(query_id)
            for query_id in (*forgotten, *self._expire_results()):
                with contextlib.suppress(CannotPersist):
                    await asyncio.to_thread(self._delete_result, query_id)
            with contextlib.suppress(CannotPersist):  # retried at the next tick
                self._persisted.commit(self._state)
            if self._state.clusters.is_starting():
                self._clock.skip(TICK * (self._realism.speed - 1))
            await asyncio.sleep(TICK.total_seconds())

    async def close(self) -> None:
        """End all worker processes; the state does not change."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._leases.clear()
        await self._workers.close_all()

    async def reset(self) -> None:
        """End all worker processes and waits after the state was cleared."""
        self.release_waiters()
        self._ended.clear()
        self._faults.clear()
        self._expired.clear()
        self._plans.delete_all_but(active=(), ended=())
        await self.close()

    async def _end_workers(self, cluster_id: UUID) -> None:
        for lease in self._leases_on(cluster_id):
            del self._leases[lease.query.id]
        await self._workers.close(cluster_id)

    def _expire_results(self) -> set[UUID]:
        """Return the queries whose results have expired since the last call."""
        if self._realism.result_lifetime is None:
            return set()
        old = self._state.queries.ended_before(self._clock.now() - self._realism.result_lifetime)
        expired = {*old} - self._expired
        self._expired |= expired
        return expired

    def _leases_on(self, cluster_id: UUID) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.query.cluster_id == cluster_id]

    def _start_queries(self, cluster_ids: Iterable[UUID]) -> None:
        for cluster_id in cluster_ids:
            if cluster_id in self._workers:
                self._assign_workers(cluster_id)

    def _assign_workers(self, cluster_id: UUID) -> None:
        """Give the cluster's free workers to running queries first, then to waiting ones."""
        leases = self._leases_on(cluster_id)
        free = self._state.clusters.find(cluster_id).spec.cluster_size
        free -= sum(lease.workers for lease in leases)
        for lease in leases:
            more = min(self._state.most_workers(lease.query) - lease.workers, free)
            lease.workers += more
            free -= more
        while not self._workers.is_busy and (query := self._state.start_next(cluster_id, free)):
            lease = Lease(
                query, min(self._state.most_workers(query), free), self._workers.take(cluster_id)
            )
            free -= lease.workers
            self._leases[query.id] = lease
            self._run_in_background(self._run(query, lease.worker))
        if self._workers.is_busy and not self._has_logged_limit:
            self._has_logged_limit = True
            print(
                f"All {self._workers.limit} worker processes, the maximum for this memory, run "
                "queries. Further queries of all clusters wait until one of these ends.",
                file=sys.stderr,
            )

    def _run_in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, query: Query, worker: Worker) -> None:
        job = Job(
            plan=str(self._plans.path(query.id)),
            engine=query.engine,
            optimization_flags=query.optimization_flags,
            temporary_uri=f"{self._temporary_uri}/{query.id}/00000000.parquet",
            part_name=f"{query.id}-00000000" if self._realism.unique_names else "00000000",
            plan_only=query.plan_format if query.only_planned else None,
        )
        # The query may have been canceled, or the cluster stopped, while the process started.
        if await worker.ready() and not query.has_ended:
            answer = await self._answer(query, worker, job)
            match answer:
                case Success(outcome):
                    self._state.succeed(query, outcome)
                case Failure(error):
                    self._state.fail(query, error)
            self._notify_waiters()
        if query.id in self._leases:  # else the cluster was stopped
            del self._leases[query.id]
            was_busy = self._workers.is_busy
            self._workers.give_back(worker)
            waiting = self._state.queries.waiting_clusters() if was_busy else []
            self._start_queries([*waiting, query.cluster_id])

    async def _answer(self, query: Query, worker: Worker, job: Job) -> Reply | None:
        """Return the reply of a ready worker; None if the query was canceled before it ran."""
        match self._faults.pop(query.id, None):
            case None:
                return await worker.run(job)
            case QueryFails(error=error):
                return Failure(error)
            case ClusterLost(message=message):
                self._run_in_background(
                    self._stop_by_itself(query.cluster_id, TerminationReason.FAILED, message)
                )
            case WorkerKilled():
                asyncio.get_running_loop().call_soon(worker.kill)
            case QueryTakes(seconds=seconds):
                while self._state.queries.seconds(query) < seconds and not query.has_ended:
                    await asyncio.sleep(TICK.total_seconds())
                return None if query.has_ended else await worker.run(job)
            case QueryHangs():
                pass
        return await worker.run(Hold())

    def _notify_waiters(self) -> None:
        for query_id in [q for q in self._ended if self._state.queries.by_id[q].has_ended]:
            self._ended.pop(query_id).set()
