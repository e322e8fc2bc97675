"""What a task has submitted ends with the task, and with nothing else.

The scope of a try keeps an entry in the ledger for the queries that it owns. The entry outlives a
worker that is killed: the next try takes it over, and resumes the queries. A try whose entry was
taken over owns nothing any more, and leaves everything alone.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import get_current_context

from . import ledger
from .airflow_internals import get_clear_number, get_task_states, is_resumed
from .airflow_versions import AirflowTaskTimeout, TaskDeferred
from .ledger import Owner, Value
from .login import log_in
from .outages import in_thread, time_limit
from .recorded_queries import end_query, end_recorded_query
from .releases import release_entry

if TYPE_CHECKING:
    from polars_cloud import DirectQuery

logger = logging.getLogger(__name__)

GRACE_SECONDS = 4.0
"""To clean up in when Airflow kills a task; it sends SIGKILL 5 seconds after SIGTERM."""

ANSWER_SECONDS = 1.5
"""Of these, for Airflow to tell whether somebody has ended the task."""

ENDED_BY_USER = {"failed", "success", "skipped", "restarting", "upstream_failed", "removed"}
"""States of a running task that somebody has marked or cleared, or whose run is out of time."""


class TaskKilled(SystemExit):
    """Airflow's SIGTERM; the exit code tells Airflow that the try failed."""

    def __init__(self) -> None:
        super().__init__(143)
        self.deadline = time.monotonic() + GRACE_SECONDS


class TaskScope:
    """The queries that a try of a task owns."""

    def __init__(self, conn_id: str) -> None:
        context = get_current_context()
        self._ti = context["ti"]
        self.conn_id = conn_id
        self.try_number = self._ti.try_number
        self.started_at = self._ti.start_date.timestamp()
        """When the try began, in seconds since the epoch; a deferral changes nothing about it."""
        self._clear_number = get_clear_number(context)
        self._lock = threading.RLock()
        self._is_on_record = False
        self._is_stale = False
        self._is_over: bool | None = None
        self.owner = Owner.current()
        self.key = ledger.task_key(self.owner, self._ti.id)
        self.queries: dict[str, Value] = {}
        """By destination: the cluster's id, the try, and the query's id once it is known."""
        self.clusters = Counter[str]()
        """How many blocks of the task use the cluster of a manifest just now."""
        self.kept: set[str] = set()
        """Keys of the entries about clusters whose use ends with the task at the latest."""
        self.task: Any = self._ti.task
        self.waits_for: Value = {}
        """What the task needs again when it is resumed after a deferral."""
        limit = self.task.execution_timeout
        self.deadline = None if limit is None else time.time() + limit.total_seconds()
        """When the task's `execution_timeout` is over, in seconds since the epoch."""
        self._submitted: dict[str, DirectQuery] = {}
        self._claimed: set[str] = set()
        self._ended: set[str] = set()
        self._tried_to_end: set[str] = set()

    # Queries

    def claim(self, destination: str, record: Value, query: DirectQuery | None = None) -> None:
        """Record a query that this try is about to submit, has submitted or has taken up.

        Raises
        ------
        RuntimeError
            A later try has taken over.
        """
        self.claim_task()
        with self._lock:
            self.queries[destination] = {**record, "try_number": self.try_number}
            self._claimed.add(destination)
            self._ended.discard(destination)  # by the query of an earlier try
            self._tried_to_end.discard(destination)
            if query is not None:
                self._submitted[destination] = query
            self._save()

    def is_claimed(self, destination: str) -> bool:
        """Whether this worker has a query with this destination already."""
        return destination in self._claimed

    def find_destination(self, query_id: str) -> str | None:
        """The destination of a query that is on record, or None if it is not."""
        for destination, record in self.queries.items():
            if record.get("query_id") == query_id:
                return destination
        return None

    def set_awaited(self, query_id: str) -> None:
        """Note that the task knows how the query ended."""
        self._ended.update(
            destination
            for destination, record in self.queries.items()
            if record.get("query_id") == query_id
        )

    def release(self, query_id: str) -> None:
        """Give a query up: it runs on, and nobody ends it."""
        with self._lock:
            self.queries = {
                destination: record
                for destination, record in self.queries.items()
                if record.get("query_id") != query_id
            }
            self._save()

    def end_queries(self, manifest: str | None = None) -> None:
        """Cancel what has not ended, all queries or those on a manifest's cluster; each once."""
        with self._lock:
            left = [name for name in self._unended(manifest) if name not in self._tried_to_end]
            self._tried_to_end.update(left)
            with ThreadPoolExecutor(max_workers=8) as threads:
                ends = [
                    threads.submit(copy_context().run, self._end, destination)
                    for destination in left
                ]
            for end in ends:
                end.result()

    def _unended(self, manifest: str | None = None) -> list[str]:
        return [
            destination
            for destination, record in self.queries.items()
            if manifest in (None, record["manifest"]) and destination not in self._ended
        ]

    def _end(self, destination: str) -> None:
        record = self.queries[destination]
        try:
            query = self._submitted.get(destination)
            has_ended = end_query(query) if query else end_recorded_query(destination, record)
        except Exception as error:
            logger.error("The query for %s was not found: %s", destination, error)
            return
        if has_ended:
            self._ended.add(destination)

    # The ledger

    def claim_task(self) -> None:
        """Record that this try is the task's owner, before it starts anything.

        Raises
        ------
        RuntimeError
            A later try has taken over.
        """
        if not self._is_on_record:
            self._save()
        if not self.is_owner():
            raise RuntimeError("A later try of this task has taken over: nothing more is started")

    def is_owner(self) -> bool:
        """Whether no later try has taken over; a worker that was frozen does not know of one.

        Tries are in the order of their ids, which are version 7 UUIDs.
        """
        return max(ledger.keys(ledger.task_key(self.owner)), default="") == self.key

    def go_on(self) -> None:
        """Take up what this try has recorded before it was deferred."""
        if entry := ledger.get(self.key):
            _, value = entry
            self._is_on_record = True
            self.queries, self.kept = value["queries"], set(value["kept"])
            self.waits_for, self.deadline = value["waits_for"], value["deadline"]

    def defer(self, waits_for: Value, deferral: TaskDeferred) -> NoReturn:
        """Leave the worker, and everything as it is, until the deferral's trigger fires."""
        self.waits_for = waits_for
        self._save()
        raise deferral

    def take_over(self) -> None:
        """Take over what earlier tries have recorded."""
        for key in sorted(ledger.keys(ledger.task_key(self.owner))):
            if key != self.key and (entry := ledger.get(key)):
                earlier = entry[1]
                self.queries |= earlier["queries"]
                self.kept |= set(earlier["kept"])
                was_cleared = earlier["clear_number"] != self._clear_number
                self._is_stale = self._is_stale or earlier["over"] or was_cleared
                self._save()
                ledger.erase(key)

    def end_stale_queries(self) -> None:
        """End what earlier tries have left, where the task was cleared or has failed since.

        Raises
        ------
        ConnectionError
            A query cannot be ended now; it stays on record.
        """
        if self._is_stale:
            logger.info("Task was cleared, or has failed: it submits everything anew")
            self.end_queries()
            if self._unended():
                raise ConnectionError("The queries of an earlier try could not be canceled")
            self.queries = {}
            self._is_stale = False
            self._save()

    # The end

    @property
    def returns_queries(self) -> bool:
        """Whether the task may return queries instead of waiting for them: a `@query_task`."""
        return hasattr(self.task, "defers")

    def use(self, manifest: str, owner: Owner) -> str:
        """Record a use of the manifest's cluster, which ends with the task at the latest; its key.

        Raises
        ------
        RuntimeError
            A later try has taken over.
        """
        key = ledger.cluster_key(manifest, owner)
        self.kept.add(key)
        if self._is_on_record:
            self._save()
        self.claim_task()
        ledger.put(key, owner, {"manifest": manifest, "conn_id": self.conn_id})
        return key

    def has_unended(self, manifest: str) -> bool:
        """Whether a query of this worker's on the manifest's cluster may still be running."""
        return any(map(self.is_claimed, self._unended(manifest)))

    def check_that_all_were_awaited(
        self, manifest: str | None = None, *, besides: Collection[str] = ()
    ) -> None:
        """Refuse to forget a query that this try has submitted.

        Parameters
        ----------
        manifest
            Look at the queries on its cluster alone.
        besides
            Destinations of queries that are going to be awaited.

        Raises
        ------
        RuntimeError
            The task knows nothing of the end of a query, of all or of those on one cluster.
        """
        forgotten = [
            name
            for name in self._unended(manifest)
            if self.is_claimed(name) and name not in besides
        ]
        if forgotten:
            raise RuntimeError(
                f"The query for {', '.join(forgotten)} is canceled, as nobody has waited for it: "
                "use run_query or wait_for, or let it run on with leave"
            )

    def close(self) -> None:
        """End what is left; what cannot be ended stays on record, for somebody who can."""
        if not self._is_on_record:
            return
        if not self.is_owner():
            logger.warning("A later try has taken over: its queries are left alone")
            return
        self.end_queries()
        for key in sorted(self.kept):
            release_entry(key)
        if self._unended():
            self._is_stale = True
            self._save()
        else:
            ledger.erase(self.key)
            self._is_on_record = False

    def is_over(self, error: BaseException) -> bool:
        """Whether the task itself has ended, and not just the worker that runs this try.

        A task that is deferred goes on elsewhere. SIGTERM comes for a user's click, and as well
        when a worker is shut down or has lost Airflow's API server. Only Airflow knows, and where
        it does not answer the queries run on.
        """
        if not isinstance(error, TaskKilled):
            return not isinstance(error, TaskDeferred)
        if self._is_over is None:
            self._is_over = self._ask_airflow()
        return self._is_over

    def _ask_airflow(self) -> bool:
        owner = self.owner
        try:
            states = in_thread(
                lambda: get_task_states(owner.dag_id, owner.run_id, owner.task_id, owner.map_index),
                ANSWER_SECONDS,
            )
        except Exception as error:
            logger.warning(
                "Worker is shut down, and Airflow does not say why: what this try has started "
                "runs on, and the next try resumes it (%s)",
                error,
            )
            return False
        if not states <= ENDED_BY_USER:
            logger.warning(
                "Worker is shut down, and nobody has ended the task: what this try has started "
                "runs on, and the next try resumes it"
            )
            return False
        return True

    def _save(self) -> None:
        self._is_on_record = True
        ledger.put(
            self.key,
            self.owner,
            {
                "conn_id": self.conn_id,
                "clear_number": self._clear_number,
                "over": self._is_stale,
                "queries": self.queries,
                "kept": sorted(self.kept),
                "waits_for": self.waits_for,
                "deadline": self.deadline,
            },
        )


_current: TaskScope | None = None


@contextmanager
def task_scope(conn_id: str) -> Iterator[TaskScope]:
    """End with the body whatever it submits, unless the next try is to resume it."""
    global _current
    scope = _current = TaskScope(conn_id)
    _unwind_when_killed(scope)
    try:
        if is_resumed(get_current_context()):
            scope.go_on()
        elif scope.try_number > 1:
            scope.take_over()
        yield scope
        scope.check_that_all_were_awaited()
    except BaseException as error:
        if scope.is_over(error):
            with grace(error), log_errors():
                scope.close()
        raise
    else:
        scope.close()
    finally:
        _current = None


@contextmanager
def logged_in(conn_id: str) -> Iterator[TaskScope]:
    """Run the body as a task that has logged in to Polars Cloud.

    Raises
    ------
    AirflowFailException, ConnectionError, ValueError
        As `include.auth.authenticate`.
    """
    with task_scope(conn_id) as scope:
        if error := log_in(conn_id):
            raise error
        scope.end_stale_queries()
        yield scope


def find_scope() -> TaskScope | None:
    """The scope of the task that is running, or None if it is not authenticated."""
    return _current


def current_scope() -> TaskScope:
    """The scope of the task that is running.

    Raises
    ------
    RuntimeError
        The task is not authenticated.
    """
    if _current is None:
        raise RuntimeError("Put @authenticate below @task: it ends what the task submits")
    return _current


@contextmanager
def grace(error: BaseException) -> Iterator[None]:
    """Keep what is done after this error within the time that Airflow gives."""
    if isinstance(error, TaskKilled):
        with time_limit(error.deadline - time.monotonic()):
            yield
    else:
        yield


@contextmanager
def log_errors() -> Iterator[None]:
    """Log what goes wrong while another error is on its way, which it must not replace."""
    try:
        yield
    except Exception:
        logger.exception("What the task has started could not be ended: it stays on record")


def _unwind_when_killed(scope: TaskScope) -> None:
    """Make Airflow's SIGTERM raise `TaskKilled` in the current task.

    By itself a `@task` that is marked failed, cleared or out of its run's time gets no exception
    and runs no `finally`: the runner's signal handler calls `on_kill`, which does nothing for it.
    """

    def on_kill() -> None:
        # Airflow calls this for a time-out as well, which needs no second exception.
        if isinstance(sys.exc_info()[1], AirflowTaskTimeout):
            return
        error = TaskKilled()
        # Killed while it is being deferred: no trigger is there yet to end what it has started.
        if _current is None and scope.waits_for and scope.is_over(error):
            with grace(error), log_errors():
                scope.close()
        raise error

    scope._ti.task.on_kill = on_kill  # type: ignore[method-assign]
