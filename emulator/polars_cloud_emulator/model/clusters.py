"""Clusters: request, start-up, idle time and stop."""

from collections.abc import Container
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID, uuid4

import msgspec

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.errors import InvalidRequest, NotFound
from polars_cloud_emulator.model.specs import ClusterSpec, check_spec

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


class Clusters:
    """The clusters of a workspace, oldest first.

    Parameters
    ----------
    python_version, polars_version
        Versions of the workers; a cluster of another version is refused.
    startup
        Time that a cluster is ``Starting``.
    """

    def __init__(
        self, clock: Clock, *, python_version: str, polars_version: str, startup: timedelta
    ) -> None:
        self._clock = clock
        self._python_version = python_version
        self._polars_version = polars_version
        self._startup = startup
        self.by_id: dict[UUID, Cluster] = {}

    def check(self, spec: ClusterSpec) -> None:
        """Check whether a cluster with this specification can run here.

        Raises
        ------
        InvalidRequest
            The specification or one of its versions is not possible.
        """
        check_spec(spec)
        if str(spec.python_version) != self._python_version:
            raise InvalidRequest(
                f"this emulator's workers run Python {self._python_version}, not "
                f"{spec.python_version}; start the emulator with the Python of your client"
            )
        if spec.polars_version != self._polars_version:
            raise InvalidRequest(
                f"this emulator's workers run Polars {self._polars_version}, not "
                f"{spec.polars_version}; register the manifest again, or install that version"
            )

    def start(self, spec: ClusterSpec, *, manifest: str | None = None) -> Cluster:
        self.check(spec)
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
        self.by_id[cluster.id] = cluster
        return cluster

    def postpone(self, cluster: Cluster, startup: timedelta) -> None:
        """Set a cluster that was just requested to ``Starting`` for this time."""
        cluster.status = ClusterStatus.STARTING
        cluster.ready_at = cluster.idle_since = cluster.requested_at + startup

    def find(self, cluster_id: UUID) -> Cluster:
        try:
            return self.by_id[cluster_id]
        except KeyError:
            raise NotFound(f"cluster {cluster_id} does not exist") from None

    def live_of(self, manifest: str) -> Cluster | None:
        live = (c for c in self.by_id.values() if c.manifest == manifest and c.is_live)
        return next(live, None)

    def end_stop(self, cluster: Cluster) -> None:
        failed = cluster.termination_reason is TerminationReason.FAILED
        cluster.status = ClusterStatus.FAILED if failed else ClusterStatus.STOPPED
        cluster.stopped_at = self._clock.now()

    def is_starting(self) -> bool:
        """Return whether any cluster is ``Starting``."""
        return any(c.status is ClusterStatus.STARTING for c in self.by_id.values())

    def become_ready(self) -> list[UUID]:
        """Set clusters whose start-up time is over to ``Idle``, and return their ids."""
        ready = [
            cluster
            for cluster in self.by_id.values()
            if cluster.status is ClusterStatus.STARTING and cluster.ready_at <= self._clock.now()
        ]
        for cluster in ready:
            cluster.status = ClusterStatus.IDLE
        return [cluster.id for cluster in ready]

    def idle_too_long(self) -> list[UUID]:
        now = self._clock.now()
        return [
            cluster.id
            for cluster in self.by_id.values()
            if cluster.status is ClusterStatus.IDLE
            and now - cluster.idle_since >= cluster.spec.idle_timeout
        ]

    def billed_seconds(self, cluster: Cluster) -> float:
        """Return the seconds from request to stop, independent of the cluster's size."""
        return ((cluster.stopped_at or self._clock.now()) - cluster.requested_at).total_seconds()

    def restore(self, by_id: dict[UUID, Cluster]) -> None:
        """Restore the clusters of an earlier process; those that were stopping are stopped."""
        self.by_id = by_id
        for cluster in by_id.values():
            if cluster.status is ClusterStatus.STOPPING:
                self.end_stop(cluster)

    def forget_oldest(self, *, in_use: Container[UUID]) -> None:
        """Drop the oldest stopped clusters above ``MAX_STOPPED_CLUSTERS``, except those in use."""
        stopped = [c.id for c in self.by_id.values() if c.stopped_at and c.id not in in_use]
        for cluster_id in stopped[: max(0, len(stopped) - MAX_STOPPED_CLUSTERS)]:
            del self.by_id[cluster_id]
