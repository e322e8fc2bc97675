"""Queries: from their submission to their end, and how long ended ones are remembered."""

from collections import deque
from collections.abc import Iterator
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal
from uuid import UUID

import msgspec

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.errors import NotFound
from polars_cloud_emulator.model.jobs import Outcome, PlanFormat

MAX_ENDED_QUERIES = 1_000


class QueryStatus(StrEnum):
    SCHEDULED = "Scheduled"
    IN_PROGRESS = "InProgress"
    SUCCESS = "Success"
    FAILED = "Failed"
    CANCELED = "Canceled"


class Query(msgspec.Struct, kw_only=True):
    id: UUID
    cluster_id: UUID
    distributed: bool
    min_workers: int | None = None
    max_workers: int | None = None
    engine: Literal["streaming", "in-memory"]
    optimization_flags: int | None
    plan_format: PlanFormat = "dot"
    """Preferred for telling its plan."""
    only_planned: bool = False
    """Ends when its plan is optimized, reads and writes nothing, and takes no worker."""
    priority: int
    labels: list[str]
    lineage: dict[str, str] | None = None
    """Its job and its parent's run, for OpenLineage."""
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

    @property
    def waits_for_workers(self) -> bool:
        return self.status is QueryStatus.SCHEDULED and self.waits_until is None


class Queries:
    """The queries of a workspace, in the order of their submission."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.by_id: dict[UUID, Query] = {}
        self.uncommitted: dict[UUID, Query] = {}
        """Queries that may differ from what was last kept: all that have not ended, and some."""
        self._oldest_end_first: deque[UUID] = deque()

    def add(self, query: Query) -> None:
        """Add a new query, or the changed copy of one that has ended."""
        self.by_id[query.id] = self.uncommitted[query.id] = query

    def find(self, query_id: UUID) -> Query:
        try:
            return self.by_id[query_id]
        except KeyError:
            raise NotFound(f"query {query_id} does not exist") from None

    def active_on(self, cluster_id: UUID) -> Iterator[Query]:
        """Queries of the cluster that have not ended."""
        return (
            q for q in self.uncommitted.values() if q.cluster_id == cluster_id and not q.has_ended
        )

    def next_on(self, cluster_id: UUID) -> Query | None:
        """The query whose turn it is: higher priority first, then first come first served.

        Before all of them comes one that is only planned: it waits for no worker.
        """
        waiting = (query for query in self.active_on(cluster_id) if query.waits_for_workers)
        return max(waiting, key=lambda query: (query.only_planned, query.priority), default=None)

    def waiting_clusters(self) -> list[UUID]:
        """Clusters on which a query waits for workers, the longest wait first."""
        waiting = (q.cluster_id for q in self.uncommitted.values() if q.waits_for_workers)
        return [*dict.fromkeys(waiting)]

    def hold_back(self, query: Query, wait: timedelta) -> None:
        """Let a query that was just submitted wait for so long before its turn may come."""
        query.waits_until = query.submitted_at + wait

    def end_waits(self) -> set[UUID]:
        """Clusters that have a query whose turn may come from now on."""
        now = self._clock.now()
        waited = [q for q in self.uncommitted.values() if q.waits_until and q.waits_until <= now]
        for query in waited:
            query.waits_until = None
        return {query.cluster_id for query in waited}

    def begin(self, query: Query) -> None:
        query.status = QueryStatus.IN_PROGRESS
        query.started_at = self._clock.now()

    def end(self, query: Query, status: QueryStatus) -> datetime:
        """End the query now; the moment."""
        query.status = status
        query.ended_at = now = self._clock.now()
        self._oldest_end_first.append(query.id)
        return now

    def seconds(self, query: Query) -> float:
        """How long the query has been running, queueing left out."""
        if query.started_at is None:
            return 0.0
        return ((query.ended_at or self._clock.now()) - query.started_at).total_seconds()

    def ended_before(self, moment: datetime) -> list[UUID]:
        """Queries that had ended by then."""
        return [q.id for q in self.by_id.values() if q.ended_at and q.ended_at <= moment]

    def mark_committed(self) -> list[UUID]:
        """Note that all is kept as it is now; the queries whose end is kept since then."""
        ended = [id_ for id_, query in self.uncommitted.items() if query.has_ended]
        for query_id in ended:
            del self.uncommitted[query_id]
        return ended

    def forget_oldest(self) -> list[UUID]:
        """Drop ended queries above the cap; the dropped queries' ids."""
        excess = len(self._oldest_end_first) - MAX_ENDED_QUERIES
        dropped = [self._oldest_end_first.popleft() for _ in range(excess)]
        for query_id in dropped:
            del self.by_id[query_id]
            self.uncommitted.pop(query_id, None)
        return dropped

    def restore(self, by_id: dict[UUID, Query]) -> None:
        """Go on with the queries of a stopped emulator: what ran waits for its turn again."""
        self.by_id = by_id
        self.uncommitted = dict(by_id)
        ends = {q.id: q.ended_at for q in by_id.values() if q.ended_at}
        self._oldest_end_first = deque(sorted(ends, key=ends.__getitem__))
        for query in by_id.values():
            if query.status is QueryStatus.IN_PROGRESS:
                query.status = QueryStatus.SCHEDULED
                query.started_at = None
