"""The state of the emulated workspace, with the rules between manifests, clusters and queries.

No I/O and no processes: every method changes the state at the current time of the injected clock.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

import msgspec

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.clusters import (
    MAX_STOPPED_CLUSTERS,
    Cluster,
    Clusters,
    ClusterStatus,
    TerminationReason,
)
from polars_cloud_emulator.model.errors import WrongState
from polars_cloud_emulator.model.jobs import Outcome, PlanFormat
from polars_cloud_emulator.model.manifests import Manifest, Manifests
from polars_cloud_emulator.model.queries import Queries, Query, QueryStatus
from polars_cloud_emulator.model.rollback import rollback_to_now


class Snapshot(msgspec.Struct):
    """The persisted part of the state."""

    manifests: dict[str, Manifest]
    clusters: dict[UUID, Cluster]
    queries: dict[UUID, Query]

    def latest(self) -> datetime:
        """Return the time of the latest event."""
        clusters, queries = self.clusters.values(), self.queries.values()
        moments = (
            *(moment for each in clusters for moment in (each.requested_at, each.stopped_at)),
            *(moment for q in queries for moment in (q.submitted_at, q.started_at, q.ended_at)),
        )
        return max(filter(None, moments), default=datetime.min.replace(tzinfo=UTC))


class State:
    """Manifests, clusters and queries of one workspace.

    Parameters
    ----------
    python_version, polars_version
        Versions of the workers.
    startup
        Time that a cluster is ``Starting``.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        python_version: str,
        polars_version: str,
        startup: timedelta = timedelta(0),
    ) -> None:
        self._clock = clock
        self.manifests = Manifests()
        self.clusters = Clusters(
            clock,
            python_version=python_version,
            polars_version=polars_version,
            startup=startup,
        )
        self.queries = Queries(clock)

    # Manifests and clusters

    def start_manifest(self, name: str) -> Cluster:
        """Return the manifest's live cluster; start one if there is none."""
        spec = self.manifests.find(name).spec
        return self.clusters.live_of(name) or self.clusters.start(spec, manifest=name)

    def unregister_manifest(self, name: str) -> None:
        """Unregister a manifest. Its live cluster, if any, keeps running without a name."""
        self.manifests.find(name)
        cluster = self.clusters.live_of(name)
        if cluster is not None:
            cluster.manifest = None
        del self.manifests.by_name[name]

    # Clusters and queries

    def submit(
        self,
        cluster_id: UUID,
        *,
        query_id: UUID,
        output_location: str | None,
        distributed: bool,
        min_workers: int | None = None,
        max_workers: int | None = None,
        engine: Literal["streaming", "in-memory"],
        optimization_flags: int | None,
        plan_format: PlanFormat = "dot",
        only_planned: bool = False,
        priority: int,
        labels: list[str],
        lineage: dict[str, str] | None = None,
        user: str | None,
    ) -> Query:
        cluster = self.clusters.find(cluster_id)
        if not cluster.is_live:
            raise WrongState(f"cluster {cluster_id} is {cluster.status}: it accepts no queries")
        query = Query(
            id=query_id,
            cluster_id=cluster_id,
            output_location=output_location,
            distributed=distributed,
            min_workers=min_workers,
            max_workers=max_workers,
            engine=engine,
            optimization_flags=optimization_flags,
            plan_format=plan_format,
            only_planned=only_planned,
            priority=priority,
            labels=labels,
            lineage=lineage,
            user=user,
            submitted_at=self._clock.now(),
        )
        self.queries.add(query)
        return query

    def most_workers(self, query: Query) -> int:
        """Return the maximum number of workers for the query."""
        if query.only_planned:
            return 0
        if not query.distributed:
            return 1
        size = self.clusters.by_id[query.cluster_id].spec.cluster_size
        return min(query.max_workers or size, size)

    def start_next(self, cluster_id: UUID, free_workers: int) -> Query | None:
        """Start the cluster's next query if enough workers are free, and return the query.

        Later queries do not overtake a query that waits for workers, so it cannot starve. A query
        never waits for more workers than it may use.
        """
        cluster = self.clusters.by_id[cluster_id]
        if cluster.status not in {ClusterStatus.IDLE, ClusterStatus.RUNNING}:
            return None
        query = self.queries.next_on(cluster_id)
        if query is None or free_workers < min(query.min_workers or 1, self.most_workers(query)):
            return None
        self.queries.begin(query)
        cluster.status = ClusterStatus.RUNNING
        return query

    def succeed(self, query: Query, outcome: Outcome) -> None:
        if not query.has_ended:
            query.outcome = outcome
            self._end(query, QueryStatus.SUCCESS)

    def fail(self, query: Query, error: str) -> None:
        if not query.has_ended:
            query.error = error
            self._end(query, QueryStatus.FAILED)

    def cancel(self, query_id: UUID) -> None:
        query = self.queries.find(query_id)
        if query.has_ended:
            self.queries.add(msgspec.structs.replace(query, cancels=query.cancels + 1))
        else:
            query.cancels += 1
            self._end(query, QueryStatus.CANCELED)

    def begin_stop(
        self, cluster: Cluster, reason: TerminationReason, message: str | None = None
    ) -> bool:
        """Begin to stop a cluster, and fail its active queries; False if it is not live."""
        if not cluster.is_live:
            return False
        cluster.status = ClusterStatus.STOPPING
        cluster.termination_reason = reason
        cluster.termination_message = message
        failed = reason is TerminationReason.FAILED
        error = f"RuntimeError: cluster {f'failed: {message}' if failed else 'was stopped'}"
        for query in self.queries.active_on(cluster.id):
            self.fail(query, error)
        return True

    def forget_oldest(self) -> list[UUID]:
        """Drop old ended queries and stopped clusters, and return the ids of the queries."""
        dropped = self.queries.forget_oldest()
        if len(self.clusters.by_id) > MAX_STOPPED_CLUSTERS:
            self.clusters.forget_oldest(in_use={q.cluster_id for q in self.queries.by_id.values()})
        return dropped

    # Rollback and restart

    def rollback_to_now(self) -> Callable[[], None]:
        """Return a function that restores the present state."""
        return rollback_to_now(self.manifests, self.clusters, self.queries)

    def clear(self) -> None:
        self.restore(Snapshot({}, {}, {}))

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the state of an earlier process; queries that were running start again."""
        self.manifests.by_name = snapshot.manifests
        self.clusters.restore(snapshot.clusters)
        self.queries.restore(snapshot.queries)
        self._clock.never_before(snapshot.latest())

    def _end(self, query: Query, status: QueryStatus) -> None:
        ended_at = self.queries.end(query, status)
        cluster = self.clusters.by_id[query.cluster_id]
        if cluster.is_live and not any(
            q.status is QueryStatus.IN_PROGRESS for q in self.queries.active_on(cluster.id)
        ):
            cluster.idle_since = ended_at
            if cluster.status is ClusterStatus.RUNNING:
                cluster.status = ClusterStatus.IDLE
