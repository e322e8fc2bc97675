"""What exists in the emulated Polars Cloud: manifests, clusters and queries, and their rules.

No I/O and no processes: every method changes the state at one moment of the injected clock.
"""

from collections import deque
from collections.abc import Iterator
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Literal
from uuid import UUID, uuid4

import msgspec

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.errors import Conflict, InvalidRequest, NotFound, WrongState
from polars_cloud_emulator.model.instance_types import instance_types
from polars_cloud_emulator.model.jobs import Outcome

DEFAULT_IDLE_TIMEOUT_MINS = 60
MINIMUM_IDLE_TIMEOUT_MINS = 10
MAX_ENDED_QUERIES = 1_000
MAX_STOPPED_CLUSTERS = 200


class ClusterStatus(StrEnum):
    STARTING = "Starting"
    IDLE = "Idle"
    RUNNING = "Running"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    FAILED = "Failed"


class TerminationReason(StrEnum):
    STOPPED_BY_USER = "StoppedByUser"
    STOPPED_INACTIVE = "StoppedInactive"
    FAILED = "Failed"


class QueryStatus(StrEnum):
    SCHEDULED = "Scheduled"
    IN_PROGRESS = "InProgress"
    SUCCESS = "Success"
    FAILED = "Failed"
    CANCELED = "Canceled"


class Version(msgspec.Struct, frozen=True):
    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


class Specs(msgspec.Struct):
    cpus: int
    ram_gb: int
    cpu_architectures: list[str] | None = None
    multiplier: int | None = None


class InstanceType(msgspec.Struct):
    standard: str
    big: str | None = None


class ClusterSpec(msgspec.Struct, kw_only=True):
    """What a cluster is to be; the body of the client's start and register calls."""

    cluster_size: int
    mode: Literal["Direct", "Proxy"]
    python_version: Version
    polars_version: str
    specs: Specs | None = None
    instance_type: InstanceType | None = None
    storage: int | None = None
    big_instance_storage: int | None = None
    labels: list[str] | None = None
    log_level: Literal["Info", "Debug", "Trace"] | None = None
    idle_timeout_mins: Annotated[int, msgspec.Meta(lt=2**31)] | None = None
    requirements_txt: str | None = None
    env_vars: dict[str, str] = {}

    @property
    def idle_timeout(self) -> timedelta:
        minutes = self.idle_timeout_mins
        return timedelta(minutes=DEFAULT_IDLE_TIMEOUT_MINS if minutes is None else minutes)


class Manifest(msgspec.Struct):
    name: str
    spec: ClusterSpec
    id: UUID


class Cluster(msgspec.Struct, kw_only=True):
    id: UUID
    spec: ClusterSpec
    manifest: str | None
    status: ClusterStatus
    requested_at: datetime
    ready_at: datetime
    idle_since: datetime
    stopped_at: datetime | None = None
    termination_reason: TerminationReason | None = None
    termination_message: str | None = None

    @property
    def is_live(self) -> bool:
        return self.status in {ClusterStatus.STARTING, ClusterStatus.IDLE, ClusterStatus.RUNNING}


class Query(msgspec.Struct, kw_only=True):
    id: UUID
    cluster_id: UUID
    distributed: bool
    min_workers: int | None = None
    max_workers: int | None = None
    engine: Literal["streaming", "in-memory"]
    optimization_flags: int | None
    priority: int
    labels: list[str]
    user: str | None
    submitted_at: datetime
    waits_until: datetime | None = None
    """When its turn may come, at the earliest."""
    output_location: str | None = None
    """Of the plan's sink; None for a temporary result."""
    status: QueryStatus = QueryStatus.SCHEDULED
    started_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: Outcome | None = None
    error: str | None = None
    """``Type: message`` of a failed query."""
    cancels: int = 0
    """How often it was to be canceled, in time or not."""

    @property
    def has_ended(self) -> bool:
        return self.ended_at is not None


class Snapshot(msgspec.Struct):
    """All that a restarted emulator needs to go on."""

    manifests: dict[str, Manifest]
    clusters: dict[UUID, Cluster]
    queries: dict[UUID, Query]


class State:
    """One workspace's manifests, clusters and queries.

    Parameters
    ----------
    python_version, polars_version
        What the workers run. Clusters cannot run anything else.
    startup
        How long a cluster is ``Starting``.
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
        self._startup = startup
        self._python_version = python_version
        self._polars_version = polars_version
        self.manifests: dict[str, Manifest] = {}
        self.clusters: dict[UUID, Cluster] = {}
        self.queries: dict[UUID, Query] = {}
        self.unsettled: dict[UUID, Query] = {}
        """Queries that may differ from what was last kept: all that have not ended, and some."""
        self._oldest_end_first: deque[UUID] = deque()

    # Manifests

    def register_manifest(self, name: str, spec: ClusterSpec) -> Manifest:
        if not name or set(name) & set("&#%+"):
            raise InvalidRequest(
                f"'{name}' cannot name a manifest: the client asks for it in a URL, where "
                "'&', '#', '%' and '+' mean something else"
            )
        if name in self.manifests:
            raise Conflict(f"manifest '{name}' exists; unregister it to register it anew")
        self._check_spec(spec)
        self.manifests[name] = Manifest(name, spec, uuid4())
        return self.manifests[name]

    def find_manifest(self, name: str) -> Manifest:
        try:
            return self.manifests[name]
        except KeyError:
            raise NotFound(f"manifest '{name}' does not exist; register it first") from None

    def unregister_manifest(self, name: str) -> None:
        """The manifest's live cluster, if any, runs on without a name."""
        self.find_manifest(name)
        cluster = self.live_cluster_of(name)
        if cluster is not None:
            cluster.manifest = None
        del self.manifests[name]

    def live_cluster_of(self, manifest: str) -> Cluster | None:
        live = (c for c in self.clusters.values() if c.manifest == manifest and c.is_live)
        return next(live, None)

    # Clusters

    def start_manifest(self, name: str) -> Cluster:
        """Start the manifest's cluster, or give the live one: there is never a second."""
        spec = self.find_manifest(name).spec
        return self.live_cluster_of(name) or self.start_cluster(spec, manifest=name)

    def start_cluster(self, spec: ClusterSpec, *, manifest: str | None = None) -> Cluster:
        self._check_spec(spec)
        if str(spec.python_version) != self._python_version:
            raise InvalidRequest(
                f"this emulator's workers run Python {self._python_version}, not "
                f"{spec.python_version}; start the emulator with the Python of your client"
            )
        if spec.polars_version != self._polars_version:
            raise InvalidRequest(
                f"this emulator's workers run Polars {self._polars_version}, not "
                f"{spec.polars_version}; register the manifest anew or install that version"
            )
        now = self._clock.now()
        cluster = Cluster(
            id=uuid4(),
            spec=spec,
            manifest=manifest,
            status=ClusterStatus.IDLE,
            requested_at=now,
            ready_at=now,
            idle_since=now,
        )
        if self._startup:
            self.postpone(cluster, self._startup)
        self.clusters[cluster.id] = cluster
        return cluster

    def postpone(self, cluster: Cluster, startup: timedelta) -> None:
        """Let a cluster that was just requested be ``Starting`` for so long."""
        cluster.status = ClusterStatus.STARTING
        cluster.ready_at = cluster.idle_since = cluster.requested_at + startup

    def find_cluster(self, cluster_id: UUID) -> Cluster:
        try:
            return self.clusters[cluster_id]
        except KeyError:
            raise NotFound(f"cluster {cluster_id} does not exist") from None

    def begin_stop(
        self, cluster: Cluster, reason: TerminationReason, message: str | None = None
    ) -> bool:
        """Whether there was something to stop. Queries that have not ended fail."""
        if not cluster.is_live:
            return False
        cluster.status = ClusterStatus.STOPPING
        cluster.termination_reason = reason
        cluster.termination_message = message
        failed = reason is TerminationReason.FAILED
        error = f"RuntimeError: cluster {f'failed: {message}' if failed else 'was stopped'}"
        for query in self._active_queries(cluster.id):
            self.fail(query, error)
        return True

    def end_stop(self, cluster: Cluster) -> None:
        failed = cluster.termination_reason is TerminationReason.FAILED
        cluster.status = ClusterStatus.FAILED if failed else ClusterStatus.STOPPED
        cluster.stopped_at = self._clock.now()

    def is_starting(self) -> bool:
        """Whether a cluster is on its way."""
        return any(c.status is ClusterStatus.STARTING for c in self.clusters.values())

    def become_ready(self) -> list[UUID]:
        """Clusters whose start-up has come to its end."""
        ready = [
            cluster
            for cluster in self.clusters.values()
            if cluster.status is ClusterStatus.STARTING and cluster.ready_at <= self._clock.now()
        ]
        for cluster in ready:
            cluster.status = ClusterStatus.IDLE
        return [cluster.id for cluster in ready]

    def idle_too_long(self) -> list[UUID]:
        now = self._clock.now()
        return [
            cluster.id
            for cluster in self.clusters.values()
            if cluster.status is ClusterStatus.IDLE
            and now - cluster.idle_since >= cluster.spec.idle_timeout
        ]

    def billed_seconds(self, cluster: Cluster) -> float:
        """Wall time of the whole cluster from request to stop, whatever its size."""
        return ((cluster.stopped_at or self._clock.now()) - cluster.requested_at).total_seconds()

    # Queries

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
        priority: int,
        labels: list[str],
        user: str | None,
    ) -> Query:
        cluster = self.find_cluster(cluster_id)
        if not cluster.is_live:
            raise WrongState(f"cluster {cluster_id} is {cluster.status}: it takes no query")
        query = Query(
            id=query_id,
            cluster_id=cluster_id,
            output_location=output_location,
            distributed=distributed,
            min_workers=min_workers,
            max_workers=max_workers,
            engine=engine,
            optimization_flags=optimization_flags,
            priority=priority,
            labels=labels,
            user=user,
            submitted_at=self._clock.now(),
        )
        self.queries[query.id] = self.unsettled[query.id] = query
        return query

    def find_query(self, query_id: UUID) -> Query:
        try:
            return self.queries[query_id]
        except KeyError:
            raise NotFound(f"query {query_id} does not exist") from None

    def start_next(self, cluster_id: UUID, free_workers: int) -> Query | None:
        """Start the query whose turn it is, if it fits.

        Higher priority first, then first come first served. One that does not fit holds back
        those behind it, so that a large query is never overtaken for ever.
        """
        cluster = self.clusters[cluster_id]
        if cluster.status not in {ClusterStatus.IDLE, ClusterStatus.RUNNING}:
            return None
        waiting = [
            q
            for q in self._active_queries(cluster_id)
            if q.status is QueryStatus.SCHEDULED and q.waits_until is None
        ]
        if not waiting:
            return None
        query = max(waiting, key=lambda q: q.priority)
        if self.workers_for(query) > free_workers:
            return None
        query.status = QueryStatus.IN_PROGRESS
        query.started_at = self._clock.now()
        cluster.status = ClusterStatus.RUNNING
        return query

    def hold_back(self, query: Query, wait: timedelta) -> None:
        """Let a query that was just submitted wait for so long before its turn may come."""
        query.waits_until = query.submitted_at + wait

    def end_waits(self) -> set[UUID]:
        """Clusters that have a query whose turn may come from now on."""
        now = self._clock.now()
        waited = [q for q in self.unsettled.values() if q.waits_until and q.waits_until <= now]
        for query in waited:
            query.waits_until = None
        return {query.cluster_id for query in waited}

    def workers_for(self, query: Query) -> int:
        """How many workers it holds; more than its cluster has if it waits for more."""
        if not query.distributed:
            return 1
        size = self.clusters[query.cluster_id].spec.cluster_size
        return max(min(query.max_workers or size, size), query.min_workers or 0)

    def query_seconds(self, query: Query) -> float:
        """How long the query has been running, queueing left out."""
        if query.started_at is None:
            return 0.0
        return ((query.ended_at or self._clock.now()) - query.started_at).total_seconds()

    def succeed(self, query: Query, outcome: Outcome) -> None:
        if not query.has_ended:
            query.outcome = outcome
            self._end(query, QueryStatus.SUCCESS)

    def fail(self, query: Query, error: str) -> None:
        if not query.has_ended:
            query.error = error
            self._end(query, QueryStatus.FAILED)

    def cancel(self, query_id: UUID) -> None:
        query = self.find_query(query_id)
        query.cancels += 1
        self.unsettled[query_id] = query
        if not query.has_ended:
            self._end(query, QueryStatus.CANCELED)

    def forget_oldest(self) -> list[UUID]:
        """Drop ended queries and stopped clusters above the caps; the dropped queries' ids."""
        excess = len(self._oldest_end_first) - MAX_ENDED_QUERIES
        dropped = [self._oldest_end_first.popleft() for _ in range(excess)]
        for query_id in dropped:
            del self.queries[query_id]
            self.unsettled.pop(query_id, None)
        if len(self.clusters) > MAX_STOPPED_CLUSTERS:
            in_use = {q.cluster_id for q in self.queries.values()}
            stopped = [c.id for c in self.clusters.values() if c.stopped_at and c.id not in in_use]
            for cluster_id in stopped[: max(0, len(stopped) - MAX_STOPPED_CLUSTERS)]:
                del self.clusters[cluster_id]
        return dropped

    def settle(self) -> None:
        """Note that all is kept as it is now."""
        self.unsettled = {
            id_: query for id_, query in self.unsettled.items() if not query.has_ended
        }

    def ended_before(self, moment: datetime) -> list[UUID]:
        """Queries that had ended by then."""
        return [q.id for q in self.queries.values() if q.ended_at and q.ended_at <= moment]

    # Restarts

    def clear(self) -> None:
        self.restore(Snapshot({}, {}, {}))

    def restore(self, snapshot: Snapshot) -> None:
        """Go on where a stopped emulator was: what it ran starts again."""
        self.manifests = snapshot.manifests
        self.clusters = snapshot.clusters
        self.queries = snapshot.queries
        self.unsettled = dict(self.queries)
        ends = {q.id: q.ended_at for q in self.queries.values() if q.ended_at}
        self._oldest_end_first = deque(sorted(ends, key=ends.__getitem__))
        for query in self.queries.values():
            if query.status is QueryStatus.IN_PROGRESS:
                query.status = QueryStatus.SCHEDULED
                query.started_at = None

    def _active_queries(self, cluster_id: UUID) -> Iterator[Query]:
        return (
            q for q in self.unsettled.values() if q.cluster_id == cluster_id and not q.has_ended
        )

    def _end(self, query: Query, status: QueryStatus) -> None:
        query.status = status
        query.ended_at = self._clock.now()
        self._oldest_end_first.append(query.id)
        cluster = self.clusters[query.cluster_id]
        if cluster.is_live and not any(
            q.status is QueryStatus.IN_PROGRESS for q in self._active_queries(cluster.id)
        ):
            cluster.idle_since = query.ended_at
            if cluster.status is ClusterStatus.RUNNING:
                cluster.status = ClusterStatus.IDLE

    @staticmethod
    def _check_spec(spec: ClusterSpec) -> None:
        if spec.cluster_size < 1:
            raise InvalidRequest("cluster_size must be at least 1")
        if (spec.specs is None) == (spec.instance_type is None):
            raise InvalidRequest("give either cpus and memory or an instance type")
        if spec.instance_type is not None:
            for name in (spec.instance_type.standard, spec.instance_type.big):
                if name is not None and name not in instance_types():
                    raise InvalidRequest(f"instance type '{name}' does not exist")
        if spec.idle_timeout < timedelta(minutes=MINIMUM_IDLE_TIMEOUT_MINS):
            raise InvalidRequest(f"idle_timeout_mins must be at least {MINIMUM_IDLE_TIMEOUT_MINS}")
