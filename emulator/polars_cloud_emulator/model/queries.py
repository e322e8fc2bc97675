"""Queries: submission, execution and end; the oldest ended queries are dropped."""

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
    """Format in which the client wants the optimized plan."""
    only_planned: bool = False
    """True if the query ends once its plan is optimized: it takes no worker and does not run."""
    priority: int
    labels: list[str]
    lineage: dict[str, str] | None = None
    """OpenLineage job and parent run."""
    user: str | None
    submitted_at: datetime
    waits_until: datetime | None = None
    """Earliest start; None if the query may start at once."""
    output_location: str | None = None
    """Target of the plan's sink; None for a temporary result."""
    status: QueryStatus = QueryStatus.SCHEDULED
    started_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: Outcome | None = None
    error: str | None = None
    """``Type: message`` of a failed query."""
    cancels: int = 0
    """Number of cancel requests, including those after the query's end."""

    @property
    def has_ended(self) -> bool:
        return self.ended_at is not None

    @property
    def waits_for_workers(self) -> bool:
        return self.status is QueryStatus.SCHEDULED and self.waits_until is None


class Queries:
    """The queries of a workspace, in order of submission."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.by_id: dict[UUID, Query] = {}
        self.uncommitted: dict[UUID, Query] = {}
        """Queries that may have changed since the last commit; all active ones are among them."""
        self._oldest_end_first: deque[UUID] = deque()

    def add(self, query: Query) -> None:
        """Add a new query, or replace an ended query by a changed copy."""
        self.by_id[query.id] = self.uncommitted[query.id] = query

    def find(self, query_id: UUID) -> Query:
        try:
            return self.by_id[query_id]
        except KeyError:
            raise NotFound(f"query {query_id} does not exist") from None

    def active_on(self, cluster_id: UUID) -> Iterator[Query]:
        """Return the cluster's queries that have not ended."""
        return (
            q for q in self.uncommitted.values() if q.cluster_id == cluster_id and not q.has_ended
        )

    def next_on(self, cluster_id: UUID) -> Query | None:
        """Return the next query to start: by priority, then in order of submission.

        Queries that are only planned come first, because they need no worker.
        """
        waiting = (query for query in self.active_on(cluster_id) if query.waits_for_workers)
        return max(waiting, key=lambda query: (query.only_planned, query.priority), default=None)

    def waiting_clusters(self) -> list[UUID]:
        """Return the clusters on which a query waits for workers, longest wait first."""
        waiting = (q.cluster_id for q in self.uncommitted.values() if q.waits_for_workers)
        return [*dict.fromkeys(waiting)]

    def hold_back(self, query: Query, wait: timedelta) -> None:
        """Delay the start of a query that was just submitted."""
        query.waits_until = query.submitted_at + wait

    def end_waits(self) -> set[UUID]:
        """End the delays that are over, and return the clusters of these queries."""
        now = self._clock.now()
        waited = [q for q in self.uncommitted.values() if q.waits_until and q.waits_until <= now]
        for query in waited:
            query.waits_until = None
        return {query.cluster_id for query in waited}

    def begin(self, query: Query) -> None:
        query.status = QueryStatus.IN_PROGRESS
        query.started_at = self._clock.now()

    def end(self, query: Query, status: QueryStatus) -> datetime:
        """End the query now, and return the time."""
        query.status = status
        query.ended_at = now = self._clock.now()
        self._oldest_end_first.append(query.id)
        return now

    def seconds(self, query: Query) -> float:
        """Return the seconds that the query has been running, without its time in the queue."""
        if query.started_at is None:
            return 0.0
        return ((query.ended_at or self._clock.now()) - query.started_at).total_seconds()

    def ended_before(self, moment: datetime) -> list[UUID]:
        """Return the queries that ended at or before a time."""
        return [q.id for q in self.by_id.values() if q.ended_at and q.ended_at <= moment]

    def mark_committed(self) -> list[UUID]:
        """Mark all queries as committed, and return those that have ended."""
        ended = [id_ for id_, query in self.uncommitted.items() if query.has_ended]
        for query_id in ended:
            del self.uncommitted[query_id]
        return ended

    def forget_oldest(self) -> list[UUID]:
        """Drop the oldest ended queries above ``MAX_ENDED_QUERIES``, and return their ids."""
        excess = len(self._oldest_end_first) - MAX_ENDED_QUERIES
        dropped = [self._oldest_end_first.popleft() for _ in range(excess)]
        for query_id in dropped:
            del self.by_id[query_id]
            self.uncommitted.pop(query_id, None)
        return dropped

    def restore(self, by_id: dict[UUID, Query]) -> None:
        """Restore the queries of an earlier process, and schedule those again that were running."""
        self.by_id = by_id
        self.uncommitted = dict(by_id)
        ends = {q.id: q.ended_at for q in by_id.values() if q.ended_at}
        self._oldest_end_first = deque(sorted(ends, key=ends.__getitem__))
        for query in by_id.values():
            if query.status is QueryStatus.IN_PROGRESS:
                query.status = QueryStatus.SCHEDULED
                query.started_at = None
