"""Queries of a try of a task."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from ..cloud.queries import find_status
from ..cloud.session import CloudSession
from ..errors import QueryNotAwaitedError, QueryRefusedError
from .end import cancel_recorded_queries, find_recorded, log_failures
from .entry import TaskEntry
from .record import QueryRecord, Result

if TYPE_CHECKING:
    from polars_cloud import DirectQuery


class TaskQueries:
    """Queries of a try, by name.

    The name of a query is its destination. A query with no destination, or with several, is named
    by its plan's digest and a number. If the code changes, the digest changes, and the next try
    does not resume such a query.

    Attributes
    ----------
    ended
        Names of queries that the task has seen end.
    results
        Records and results by name, of queries that the task has waited for. The result is None if
        a query has not succeeded.
    not_canceled
        Names of queries that could not be canceled.
    is_closed
        Whether the task has ended and submits no more queries.
    """

    def __init__(self, entry: TaskEntry, session: CloudSession, try_number: int) -> None:
        self._entry = entry
        self._session = session
        self._try_number = try_number
        self._reserved: dict[str, str] = {}
        """Name of the query by each of its destinations, and by the name itself."""
        self._connected: dict[str, DirectQuery] = {}
        """Queries by name, over the open connections of this worker."""
        self.ended: set[str] = set()
        self.results: dict[str, tuple[QueryRecord, Result | None]] = {}
        self.not_canceled: set[str] = set()
        self.is_closed = False

    def reserve_name(self, destinations: Collection[str], digest: str) -> str:
        """Reserve and return the name of a query that is about to be submitted.

        Raises
        ------
        QueryRefusedError
            The task has ended, or another of its queries writes to the destination.
        """
        with self._entry.lock:
            if self.is_closed:
                raise QueryRefusedError(
                    f"The query for {', '.join(destinations) or 'a temporary result'} was not "
                    "submitted, because its task has ended: wait for the task's threads"
                )
            for destination in destinations:
                if destination in self._reserved:
                    query = self.get_record(destination)
                    raise QueryRefusedError(
                        f"This query was not submitted, because query "
                        f"{query.query_id if query else '(id not known yet)'} of the same task "
                        f"writes to {destination}, too: give each query its own destination"
                    )
            if len(destinations) == 1:
                [name] = destinations
            else:
                turn = 1
                while (name := f"temporary result {digest}, {turn}") in self._reserved:
                    turn += 1
            self._reserved.update(dict.fromkeys([*destinations, name], name))
            return name

    def release_name(self, name: str) -> None:
        """Make a name available again: its query was not submitted, or has written nothing."""
        with self._entry.lock:
            reserved = self._reserved.items()
            self._reserved = {key: owner for key, owner in reserved if owner != name}

    def get_record(self, name: str) -> QueryRecord | None:
        return self._entry.record.queries.get(name)

    def find_resumable(self, name: str) -> DirectQuery | None:
        """Return the query of an earlier try if it is running or has succeeded, or else None."""
        earlier = self.get_record(name)
        if earlier is None:
            return None
        query = find_recorded(self._session, name, earlier)
        status = find_status(self._session, query) if query else None
        if status is None or (status.is_done() and status.name != "SUCCESS"):
            return None
        return query

    def record_query(self, name: str, query: QueryRecord, found: DirectQuery | None = None) -> None:
        """Record a query before its submission, or with `found` after its submission or resume.

        Raises
        ------
        TakenOverError
            A later try has adopted the task's entry.
        """
        query.try_number = self._try_number
        with self._entry.lock:
            if found is None:
                self._entry.check_owned()
            else:
                self._connected[name] = found
            self._entry.record.queries[name] = query
            self.ended.discard(name)  # an earlier query of this name may have ended
            self._entry.save()

    def find_name(self, query_id: str) -> str | None:
        """Return the name of the query with this id, or None if it is not recorded."""
        for name, query in self._entry.record.queries.items():
            if query.query_id == query_id:
                return name
        return None

    def mark_ended(self, query_id: str, result: Result | None = None) -> None:
        """Mark the query as ended; `result` is None if it has not succeeded."""
        if name := self.find_name(query_id):
            self.ended.add(name)
            self.results[name] = self._entry.record.queries[name], result

    def forget(self, query_id: str) -> None:
        """Remove the query from the record: it keeps running after the task."""
        with self._entry.lock:
            if name := self.find_name(query_id):
                del self._entry.record.queries[name]
                self._entry.save()

    def get_unended(self, names: Collection[str] | None = None) -> list[str]:
        """Return the names of this worker's queries, or of the named ones, that may be running."""
        return [
            name
            for name in list(self._entry.record.queries)
            if name in self._connected
            and name not in self.ended
            and (names is None or name in names)
        ]

    def get_connected(self, names: Iterable[str]) -> dict[str, DirectQuery]:
        """Return the named queries that this worker is connected to."""
        return {name: self._connected[name] for name in names if name in self._connected}

    def check_awaited(
        self, names: Collection[str] | None = None, *, excluding: Collection[str] = ()
    ) -> None:
        """Raise if the task has not waited for one of this try's queries.

        Parameters
        ----------
        names
            Names of the queries to check; None for all.
        excluding
            Names of queries that the task will wait for.

        Raises
        ------
        QueryNotAwaitedError
            The task has not waited for a query.
        """
        if forgotten := [name for name in self.get_unended(names) if name not in excluding]:
            raise QueryNotAwaitedError(
                f"The task has not waited for its query for {', '.join(forgotten)}, so the query "
                "is canceled unless it has ended: call its await_result inside the use_cluster "
                "block, return it from a @query_task, or detach it"
            )

    def uses_cluster(self, manifest: str) -> bool:
        """Return whether a query of the task may be running on the manifest's cluster."""
        queries = list(self._entry.record.queries.items())
        return any(each.manifest == manifest for name, each in queries if name not in self.ended)

    def cancel(self, names: Collection[str]) -> None:
        """Cancel the named queries that have not ended, once; never raises."""
        record = self._entry.record
        to_end = (set(names) & record.queries.keys()) - self.ended - self.not_canceled
        queries = {name: record.queries[name] for name in to_end}
        left = cancel_recorded_queries(self._session, record.owner, queries, self.connect)
        self.ended |= to_end - left.keys()
        for name in to_end - left.keys():
            self.release_name(name)  # the task may continue, and submit the query again
        self.not_canceled.update(left)
        log_failures(left.values())

    def cancel_adopted(self, *, excluding: Collection[str] = ()) -> None:
        """Cancel queries of earlier tries that this try has not resumed.

        There are such queries if the code or a destination has changed. This try's queries may be
        queued behind them.

        Parameters
        ----------
        excluding
            Names of queries that the task waits for.
        """
        with self._entry.lock:
            adopted = (
                self._entry.record.queries.keys() - self._connected.keys() - self._reserved.keys()
            )
        self.cancel(adopted - set(excluding))

    def connect(self, session: CloudSession, name: str, query: QueryRecord) -> DirectQuery | None:
        """Return the query, over this worker's open connection or a new one; None if it is gone."""
        return self._connected.get(name) or find_recorded(session, name, query)
