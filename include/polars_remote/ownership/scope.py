"""What a try of a task owns: its login, its queries and its use of clusters, on record.

The entry outlives a worker that is killed: the next try adopts it, and resumes the queries. A try
whose entry was adopted owns nothing any more, and leaves everything alone.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

from airflow.sdk import get_current_context

from ..cloud.advice import add_advice
from ..cloud.queries import find_status
from ..cloud.session import CloudSession
from ..compat.internals import get_clear_number, is_resumed
from ..compat.versions import AirflowTaskTimeout, TaskDeferred
from ..errors import (
    NotAuthenticatedError,
    QueryNotAwaitedError,
    QueryRefusedError,
    TakenOverError,
)
from . import record
from .end import end_queries, end_task, end_use, find_recorded, log_left
from .kills import TaskKilled, grace, is_ended_by_user
from .record import ClusterUse, Owner, QueryRecord, TaskRecord, Wait

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, DirectQuery

logger = logging.getLogger(__name__)

OWNER_SECONDS = 5.0
"""Seconds for which a try counts as the latest without asking: Airflow starts the next one after a
frozen worker's heartbeats have been missing for far longer."""

SCOPE = "polars_remote_scope"
"""Key of the scope in Airflow's context of the try, where each of its threads finds it."""


class TaskScope:
    """The queries and clusters of a try of a task.

    Attributes
    ----------
    session
        Calls Polars Cloud.
    record
        What is stored of it.
    task
        Airflow's operator.
    started_at
        When the try began, in seconds since the epoch; a deferral does not change it.
    open_blocks
        Number of open `use_cluster` blocks, by manifest.
    """

    def __init__(self, conn_id: str) -> None:
        context = get_current_context()
        ti = context["ti"]
        self.task: Any = ti.task
        self.try_number = ti.try_number
        self.started_at = ti.start_date.timestamp()
        self.session = CloudSession(conn_id)
        self.owner = Owner.current()
        self.key = record.task_key(self.owner, ti.id)
        limit = self.task.execution_timeout
        self.record = TaskRecord(
            owner=self.owner,
            conn_id=conn_id,
            clear_number=get_clear_number(context),
            deadline=None if limit is None else time.time() + limit.total_seconds(),
        )
        self.open_blocks = Counter[str]()
        self._lock = threading.RLock()
        self._owner_at = time.time()
        """When this try was known to be the latest."""
        self._is_on_record = False
        self._is_closed = False
        self._is_killed = False
        self._is_ended_by_user: bool | None = None
        self._open: dict[str, DirectQuery] = {}
        """Queries that this worker is connected to, by name."""
        self._reserved: set[str] = set()
        self._ended: set[str] = set()
        self._given_up: set[str] = set()
        """Names of queries, and keys of uses of clusters, that could not be ended."""
        self._block_turns = defaultdict[str, threading.RLock](threading.RLock)

    # Queries

    def reserve_query(self, destinations: Collection[str], digest: str) -> str:
        """Return the name of a query that is about to be submitted.

        The name is the destination. A query with none, or with several, is named by its plan and
        its turn, so that a try whose code has changed does not resume the query of another plan.

        Raises
        ------
        QueryRefusedError
            The task has ended, or writes to a destination already.
        """
        with self._lock:
            if self._is_closed:
                raise QueryRefusedError(
                    f"The query for {', '.join(destinations) or 'a temporary result'} was not "
                    "submitted, because its task has ended: wait for the task's threads"
                )
            for destination in destinations:
                if destination in self._reserved:
                    query = self.record.queries.get(destination)
                    raise QueryRefusedError(
                        f"Two queries of this task write to {destination}: the one with id "
                        f"{query.query_id if query else 'unknown yet'} and the one that was about "
                        "to be submitted. Give each a destination of its own"
                    )
            if len(destinations) == 1:
                [name] = destinations
            else:
                turn = 1
                while (name := f"temporary result {digest}, {turn}") in self._reserved:
                    turn += 1
            self._reserved.update(destinations, [name])
            return name

    def return_query(self, name: str, destinations: Collection[str]) -> None:
        """Take back a reservation: the query was not submitted."""
        with self._lock:
            self._reserved.difference_update(destinations, [name])

    def find_resumable(self, name: str) -> DirectQuery | None:
        """Connect to an earlier try's query, unless there is none or it will never succeed."""
        earlier = self.record.queries.get(name)
        if earlier is None:
            return None
        query = find_recorded(self.session, name, earlier)
        status = find_status(self.session, query) if query else None
        if status is None or (status.is_done() and status.name != "SUCCESS"):
            return None
        return query

    @property
    def is_closed(self) -> bool:
        """Return whether the task has ended: nothing is submitted any more."""
        return self._is_closed

    def record_query(self, name: str, query: QueryRecord, found: DirectQuery | None = None) -> None:
        """Record a query that this try is about to submit or, if found, has submitted or resumed.

        Raises
        ------
        TakenOverError
            A later try owns the task's queries.
        """
        query.try_number = self.try_number
        with self._lock:
            if found is None:
                self.check_owner()
            self.record.queries[name] = query
            self._ended.discard(name)  # by the query of an earlier try
            if found is not None:
                self._open[name] = found
            self._save()

    def find_name(self, query_id: str) -> str | None:
        """Return the name of a query by its id, or None if it is not on record."""
        for name, query in self.record.queries.items():
            if query.query_id == query_id:
                return name
        return None

    def mark_ended(self, query_id: str) -> None:
        """Note that the task knows how the query ended."""
        with self._lock:
            if name := self.find_name(query_id):
                self._ended.add(name)

    def forget_query(self, query_id: str) -> None:
        """Detach the query: it runs on, and nobody ends it."""
        with self._lock:
            if name := self.find_name(query_id):
                del self.record.queries[name]
                self._save()

    def get_unended(self, names: Collection[str] | None = None) -> list[str]:
        """Return the names of this worker's queries whose end it does not know.

        Parameters
        ----------
        names
            Return only queries with these names.
        """
        return [
            name
            for name in list(self.record.queries)
            if name in self._open and name not in self._ended and (names is None or name in names)
        ]

    def get_open(self, names: Iterable[str]) -> dict[str, DirectQuery]:
        """Return queries that this worker is connected to, by name."""
        return {name: self._open[name] for name in names}

    def get_open_query(self, name: str) -> DirectQuery | None:
        """Return a query that this worker is connected to, or None if it is not."""
        return self._open.get(name)

    def check_that_all_were_awaited(
        self, names: Collection[str] | None = None, *, besides: Collection[str] = ()
    ) -> None:
        """Refuse to forget a query that this try has submitted.

        Parameters
        ----------
        names
            Check only the queries with these names.
        besides
            Names of queries that are going to be awaited.

        Raises
        ------
        QueryNotAwaitedError
            The task does not know how a query ended.
        """
        if forgotten := [name for name in self.get_unended(names) if name not in besides]:
            raise QueryNotAwaitedError(
                f"Nobody has waited for the query for {', '.join(forgotten)}, which is canceled: "
                "call its await_result, return it from a @query_task, or let it run on with detach"
            )

    # Clusters

    def check_open(self, manifest: str) -> None:
        """Refuse to use a cluster after the task has ended.

        Raises
        ------
        QueryRefusedError
        """
        if self._is_closed:
            raise QueryRefusedError(
                f"The cluster of manifest {manifest} is not used, because its task has ended: "
                "wait for the task's threads"
            )

    def record_use(self, use: ClusterUse) -> None:
        """Record a use of a cluster, which ends with the task at the latest.

        Raises
        ------
        QueryRefusedError
            The task has ended.
        TakenOverError
            A later try owns the task's queries.
        """
        with self._lock:
            self.check_open(use.manifest)
            self.check_owner()
            if use.key not in self.record.cluster_uses:
                self.record.cluster_uses.append(use.key)
            self._save()
        record.put(use.key, use)

    @contextmanager
    def changing_blocks(self, manifest: str) -> Iterator[None]:
        """Let threads of the task open and close blocks of one manifest one after the other."""
        with self._lock:
            turn = self._block_turns[manifest]
        with turn:
            yield

    def close_block(
        self,
        use: ClusterUse,
        ctx: ComputeContext,
        names: Collection[str],
        error: BaseException | None = None,
    ) -> None:
        """End a block that uses a cluster; after an error, with its queries of these names."""
        with grace(error):
            owns_record = self._owns_record()
            if error and owns_record:
                to_end = (set(names) & self.record.queries.keys()) - self._ended - self._given_up
                queries = {name: self.record.queries[name] for name in to_end}
                left = end_queries(self.session, self.owner, queries, self._find)
                self._ended |= to_end - left.keys()
                self._given_up.update(left)
                log_left(left.values())
            with self.changing_blocks(use.manifest):
                self.open_blocks[use.manifest] -= 1
                if owns_record and not self.open_blocks[use.manifest]:
                    self._end_use(use, ctx)

    def _end_use(self, use: ClusterUse, ctx: ComputeContext) -> None:
        queries = list(self.record.queries.items())
        if any(each.manifest == use.manifest for name, each in queries if name not in self._ended):
            return  # a query of the task may still run: the use ends with the task
        if left := end_use(self.session, use, ctx):
            self._given_up.add(use.key)
        else:
            self._given_up.discard(use.key)
            self.keep_cluster(use)
        log_left(left)

    def keep_cluster(self, use: ClusterUse) -> None:
        """Let the use of a cluster outlast the task."""
        with self._lock:
            if use.key in self.record.cluster_uses:
                self.record.cluster_uses.remove(use.key)

    # The record

    def is_owner(self) -> bool:
        """Return whether no later try has adopted the queries.

        A worker that was frozen does not know of one. Tries are in the order of their ids, which
        are version 7 UUIDs.
        """
        if time.time() - self._owner_at > OWNER_SECONDS:
            asked_at = time.time()
            if max(record.find_keys(record.task_key(self.owner)), default="") > self.key:
                return False
            self._owner_at = asked_at
        return True

    def check_owner(self) -> None:
        """Start nothing that a later try does not know of: this worker may have been frozen.

        Raises
        ------
        TakenOverError
            A later try owns the task's queries.
        """
        if not self.is_owner():
            raise TakenOverError("A later try of this task owns its queries: nothing is started")

    def restore(self) -> None:
        """Take up what this try has recorded before it was deferred."""
        if stored := record.get_task(self.key):
            self._is_on_record = True
            self.record = stored

    def adopt_earlier_tries(self) -> None:
        """Adopt what earlier tries have recorded."""
        mine = self.record
        for key in sorted(record.find_keys(record.task_key(self.owner))):
            if key < self.key and (earlier := record.get_task(key)):
                mine.queries |= earlier.queries
                mine.cluster_uses = [*dict.fromkeys(mine.cluster_uses + earlier.cluster_uses)]
                was_cleared = earlier.clear_number != mine.clear_number
                mine.is_stale = mine.is_stale or earlier.is_stale or was_cleared
                self._save()
                record.erase(key)

    def begin(self) -> None:
        """Log in, and end what earlier tries have left if the task was cleared or has failed.

        Raises
        ------
        LoginRefusedError, ValueError
            As `CloudSession.log_in`.
        ConnectionError
            Polars Cloud cannot be reached, or an earlier query cannot be canceled now.
        """
        self.session.log_in()
        if self.record.is_stale:
            logger.info("The task was cleared, or has failed: it submits everything anew")
            left = end_queries(self.session, self.owner, self.record.queries)
            if left:
                self._given_up.update(left)
                reasons = "; ".join(str(each) for each in left.values())
                raise ConnectionError(f"An earlier try's queries still run. {reasons}")
            self.record.queries = {}
            self.record.is_stale = False
            self._save()

    def settle(self, returned: Any) -> Any:
        """Return the task's value: a `@query_task` waits for the queries in what was returned."""
        settle = getattr(self.task, "settle", None)
        return settle(self, returned) if settle else returned

    @property
    def can_return_queries(self) -> bool:
        """Return whether the task may return queries instead of waiting for them."""
        return hasattr(self.task, "defers")

    def defer(self, waits_for: Wait, deferral: TaskDeferred) -> NoReturn:
        """Leave the worker, and everything as it is, until the deferral's trigger fires."""
        self.record.waits_for = waits_for
        self._save()
        raise deferral

    # The end

    def is_finished_by(self, error: BaseException) -> bool:
        """Return whether the task itself has ended, and not just the worker that runs this try.

        A task that is deferred goes on elsewhere.
        """
        if not isinstance(error, TaskKilled):
            return not isinstance(error, TaskDeferred)
        if self._is_ended_by_user is None:
            self._is_ended_by_user = is_ended_by_user(self.owner)
        return self._is_ended_by_user

    def close(self, error: BaseException | None = None) -> None:
        """End what is left, and log what could not be ended; never raises."""
        self.leave()
        if not self._is_on_record:
            return
        with grace(error):
            if not self._owns_record():
                return
            left = end_task(
                self.session,
                self.key,
                self.record,
                ended=self._ended,
                given_up=self._given_up,
                find=self._find,
            )
            log_left(left)
            self._is_on_record = bool(left or self._given_up)

    def leave(self) -> None:
        """Submit nothing any more, and leave everything to the next try or the trigger."""
        with self._lock:
            self._is_closed = True

    def on_kill(self) -> None:
        """Unwind the task: by itself Airflow's SIGTERM runs no `finally` of a `@task`.

        Raises
        ------
        TaskKilled
        """
        # Airflow calls this for a time-out as well, which needs no second exception.
        if isinstance(sys.exc_info()[1], AirflowTaskTimeout):
            return
        error = TaskKilled()
        self._is_killed = True
        # Killed while it is being deferred: no trigger is there yet to end what it has started.
        if self._is_closed and self.record.waits_for and self.is_finished_by(error):
            self.close(error)
        raise error

    def check_killed(self) -> None:
        """End a wait when the task is killed: Airflow's signals reach the main thread alone.

        Raises
        ------
        TaskKilled
        """
        if self._is_killed:
            raise TaskKilled

    def _owns_record(self) -> bool:
        try:
            if self.is_owner():
                return True
            logger.warning("A later try of this task owns its queries: they are left alone")
        except Exception as error:
            logger.warning("Airflow does not answer: the task's queries are left alone (%s)", error)
        return False

    def _find(self, session: CloudSession, name: str, query: QueryRecord) -> DirectQuery | None:
        return self._open.get(name) or find_recorded(session, name, query)

    def _save(self) -> None:
        self._is_on_record = True
        record.put(self.key, self.record)


@contextmanager
def task_scope(conn_id: str) -> Iterator[TaskScope]:
    """End with the body whatever it starts, unless the next try is to resume it."""
    scope = TaskScope(conn_id)
    context = cast("dict[str, Any]", get_current_context())
    context[SCOPE] = scope
    # On the task itself: when SIGTERM comes while it is being deferred, its context is gone.
    scope.task.on_kill = scope.on_kill
    try:
        if is_resumed(get_current_context()):
            scope.restore()
        elif scope.try_number > 1:
            scope.adopt_earlier_tries()
        yield scope
        scope.check_that_all_were_awaited()
    except BaseException as error:
        if isinstance(error, Exception):
            add_advice(error, sorted(scope.task.upstream_task_ids))
        if scope.is_finished_by(error):
            scope.close(error)
        else:
            scope.leave()
        raise
    else:
        scope.close()


def find_scope() -> TaskScope | None:
    """Return the scope of the task that is running, or None if it is not authenticated."""
    try:
        context = cast("dict[str, Any]", get_current_context())
    except RuntimeError:  # no task is running
        return None
    scope: TaskScope | None = context.get(SCOPE)
    return scope


def current_scope() -> TaskScope:
    """Return the scope of the task that is running.

    Raises
    ------
    NotAuthenticatedError
        The task is not authenticated.
    """
    scope = find_scope()
    if scope is None:
        raise NotAuthenticatedError("Put @authenticate below @task: it ends what the task submits")
    return scope
