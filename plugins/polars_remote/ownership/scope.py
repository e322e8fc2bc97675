"""A try of a task, with its login, queries and cluster uses, which end with the try."""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

from airflow.sdk import get_current_context

from ..cloud.advice import add_advice
from ..cloud.client import (
    get_cluster_id,
    get_manifest_name,
    get_size,
    holds_query,
    refuse_queries_without_context,
)
from ..cloud.session import CloudSession
from ..compat.copies import FOLDER, describe, find_hidden_copies
from ..compat.internals import get_clear_number, is_resumed
from ..compat.versions import AirflowTaskTimeout, TaskDeferred
from ..errors import LoginRefusedError, NotAuthenticatedError, QueryRefusedError
from . import lineage, record
from .end import cancel_recorded_queries, end_task, end_use, log_failures
from .entry import TaskEntry
from .kills import TaskKilled, is_ended_by_user, limit_to_grace_period
from .record import ClusterUse, Owner, TaskRecord, Wait
from .task_queries import TaskQueries

if TYPE_CHECKING:
    from polars_cloud import ComputeContext

    from .lineage import Lineage

logger = logging.getLogger(__name__)

SCOPE = "polars_remote_scope"
"""Key of the scope in Airflow's task context, which the task's threads share."""


class TaskClusters:
    """Clusters that a try uses, each until the last block and the last query on it have ended."""

    def __init__(self, entry: TaskEntry, session: CloudSession, queries: TaskQueries) -> None:
        self._entry = entry
        self._session = session
        self._queries = queries
        self._blocks = Counter[str]()
        """Number of open `use_cluster` blocks, by manifest."""
        self._manifest_locks = defaultdict[str, threading.RLock](threading.RLock)
        self._uses: dict[str, ClusterUse] = {}
        """Recorded uses, by manifest."""
        self.not_ended: set[str] = set()
        """Keys of uses that could not be ended."""

    def check_open(self, manifest: str) -> None:
        """Raise `QueryRefusedError` if the task has ended."""
        if self._queries.is_closed:
            raise QueryRefusedError(
                f"The cluster of manifest {manifest} is not used, because its task has ended: "
                "wait for the task's threads"
            )

    @contextmanager
    def lock_manifest(self, manifest: str) -> Iterator[None]:
        """Let one thread of the task at a time open or close a block of the manifest."""
        with self._entry.lock:
            lock = self._manifest_locks[manifest]
        with lock:
            yield

    def open_block(self, manifest: str) -> None:
        self._blocks[manifest] += 1

    def record_use(self, use: ClusterUse) -> None:
        """Record a use of a cluster, which ends with the task at the latest.

        Raises
        ------
        QueryRefusedError
            The task has ended.
        TakenOverError
            A later try has adopted the task's entry.
        """
        with self._entry.lock:
            self.check_open(use.manifest)
            self._entry.check_owned()
            earlier = self._uses.get(use.manifest)  # by an outer block
            if use.key not in self._entry.record.cluster_uses:
                self._entry.record.cluster_uses.append(use.key)
            elif earlier is None:
                earlier = record.get_use(use.key)  # by an earlier try, or before a deferral
            self._entry.save()
            if earlier:
                use.merge(earlier)
            self._uses[use.manifest] = use
        record.put(use.key, use)

    def add_cluster(self, ctx: ComputeContext) -> None:
        """Record the cluster that the task has started, so that its cost can be logged later."""
        manifest, cluster_id = get_manifest_name(ctx), get_cluster_id(ctx)
        use = self._uses.get(manifest or "")
        if use and cluster_id and cluster_id not in use.clusters:
            use.add_cluster(cluster_id, *get_size(ctx), has_started=True)
            record.put(use.key, use)

    def leave_to_idle_timeout(self, manifest: str) -> None:
        """Leave the manifest's cluster to its idle timeout, because a detached query runs on it."""
        if (use := self._uses.get(manifest)) and use.stops:
            use.stops = False
            record.put(use.key, use)

    def close_block(
        self,
        use: ClusterUse | None,
        ctx: ComputeContext,
        names: Collection[str],
        error: BaseException | None = None,
    ) -> None:
        """End a `use_cluster` block; after an error, cancel the block's queries first.

        Parameters
        ----------
        use
            Use of the cluster; None for a cluster of your own, which is not stopped.
        names
            Names of the block's queries.
        """
        with limit_to_grace_period(error):
            can_end = self._entry.can_be_ended()
            if error and can_end:
                self._queries.cancel(names)
            if use is None:
                return
            with self.lock_manifest(use.manifest):
                self._blocks[use.manifest] -= 1
                if (
                    can_end
                    and not self._blocks[use.manifest]
                    and not self._queries.uses_cluster(use.manifest)
                ):
                    self._end(use, ctx)

    def remove_use(self, use: ClusterUse) -> None:
        """Remove a cluster use from the task's entry: the use no longer ends with the task."""
        with self._entry.lock:
            if use.key in self._entry.record.cluster_uses:
                self._entry.record.cluster_uses.remove(use.key)

    def _end(self, use: ClusterUse, ctx: ComputeContext) -> None:
        use = self._uses.get(use.manifest, use)
        left = end_use(self._session, use, ctx, waits_for_stop=True).left
        if left:
            self.not_ended.add(use.key)
        else:
            self.not_ended.discard(use.key)
            self.remove_use(use)
            self._uses.pop(use.manifest, None)
        log_failures(left)


class TaskScope:
    """A try of a task.

    Attributes
    ----------
    task
        Airflow's operator.
    started_at
        Start of the try, in seconds since the epoch. A deferral does not change it.
    session
        Session for calls to Polars Cloud.
    entry, queries, clusters
        Entry in the record, queries and clusters of the try.
    """

    def __init__(self, conn_id: str) -> None:
        try:
            context = get_current_context()
        except RuntimeError:
            raise NotAuthenticatedError(
                "The function below @authenticate was called outside of a task: put @query_task, "
                "or @task, above @authenticate"
            ) from None
        ti = context["ti"]
        self.task: Any = ti.task
        self.started_at = ti.start_date.timestamp()
        self.session = CloudSession(conn_id)
        limit = self.task.execution_timeout
        owner = Owner.current()
        task = TaskRecord(
            owner=owner,
            conn_id=conn_id,
            clear_number=get_clear_number(context),
            deadline=None if limit is None else time.time() + limit.total_seconds(),
        )
        self.entry = TaskEntry(record.task_key(owner, ti.id), task)
        self.queries = TaskQueries(self.entry, self.session, ti.try_number)
        self.clusters = TaskClusters(self.entry, self.session, self.queries)
        # A retry changes neither value; clearing the task changes the second.
        self._clear_id = context["dag_run"].start_date, ti.max_tries
        self._is_killed = False
        self._is_detached = False
        self._is_ended_by_user: bool | None = None

    @property
    def record(self) -> TaskRecord:
        """Return the content of the entry."""
        return self.entry.record

    @property
    def can_return_queries(self) -> bool:
        """Return whether the task may return queries instead of waiting for them."""
        return hasattr(self.task, "defers")

    def get_sink_uuid(self, table: str) -> str:
        """Return the UUID of the task's append to an Iceberg table, as hexadecimal text.

        All tries have the same UUID until a user clears the task.
        """
        parts = (*self.record.owner, *self._clear_id, table)
        return uuid.uuid5(uuid.NAMESPACE_OID, "\0".join(map(str, parts))).hex

    def begin(self) -> None:
        """Log in, and cancel earlier tries' queries if the task was cleared or has failed.

        Raises
        ------
        LoginRefusedError, ValueError
            See `CloudSession.log_in`.
        ConnectionError
            Polars Cloud is unreachable, or an earlier query could not be canceled.
        """
        self.session.log_in()
        refuse_queries_without_context()
        if self.record.is_stale:
            logger.info("The task was cleared or has failed: it submits all its queries again")
            left = cancel_recorded_queries(self.session, self.record.owner, self.record.queries)
            if left:
                self.queries.not_canceled.update(left)
                reasons = "; ".join(str(each) for each in left.values())
                raise ConnectionError(
                    f"Queries of an earlier try are still running, so this try submits none: "
                    f"{reasons}"
                )
            self.record.queries = {}
            self.record.is_stale = False
            self.entry.save()

    def await_returned_queries(self, returned: Any) -> Any:
        """Return the task's value. A `@query_task` first waits for the queries in it.

        Raises
        ------
        QueryRefusedError
            A task that is no `@query_task` returned a query or a result, which Airflow cannot
            store.
        """
        if wait := getattr(self.task, "await_returned_queries", None):
            return wait(self, returned)
        if self.task.do_xcom_push and holds_query(returned):
            raise QueryRefusedError(
                "The task returned a query or its result, which only a @query_task may: replace "
                "@task by @query_task, or return query.await_result().location"
            )
        return returned

    def defer(self, waits_for: Wait, deferral: TaskDeferred) -> NoReturn:
        """Save the entry and defer the task. Its queries and clusters keep running."""
        self.record.waits_for = waits_for
        self.entry.save()
        raise deferral

    def is_finished_by(self, error: BaseException) -> bool:
        """Return whether the error ends the task: its queries are then canceled.

        A deferral does not end the task, nor does a worker that shuts down.
        """
        # In a coroutine, the kill appears as a cancellation.
        if not isinstance(error, TaskKilled) and not self._is_killed:
            # A block may be closed after the task was deferred.
            return not (self._is_detached or isinstance(error, TaskDeferred))
        if self._is_ended_by_user is None:
            self._is_ended_by_user = is_ended_by_user(self.record.owner)
        return self._is_ended_by_user

    def close(self, error: BaseException | None = None) -> None:
        """End the task's queries and cluster uses, and log failures; never raises."""
        with self.entry.lock:
            self.queries.is_closed = True
        if not self.entry.is_stored:
            return
        with limit_to_grace_period(error):
            if not self.entry.can_be_ended():
                return
            skip = self.queries.not_canceled | self.clusters.not_ended
            left = end_task(
                self.session,
                self.entry.key,
                self.record,
                ended=self.queries.ended,
                skip=skip,
                find=self.queries.connect,
            )
            log_failures(left)
            self.entry.is_stored = bool(left or skip)

    def detach(self) -> None:
        """Refuse further queries. The next try or the trigger continues with those recorded."""
        with self.entry.lock:
            self.queries.is_closed = self._is_detached = True

    def report_datasets(self, _: object) -> Lineage:
        """Return the datasets of the queries that have ended, for the OpenLineage provider."""
        return lineage.report_datasets(self.queries.results.values())

    def on_kill(self) -> None:
        """Raise `TaskKilled`, because SIGTERM alone runs no `finally` block of a `@task`."""
        # Airflow also calls this after a time-out, which has raised its own exception.
        if isinstance(sys.exc_info()[1], AirflowTaskTimeout):
            return
        error = TaskKilled()
        self._is_killed = True
        # Killed while being deferred: no trigger exists yet that could cancel the queries.
        if self.queries.is_closed and self.record.waits_for and self.is_finished_by(error):
            self.close(error)
        raise error

    def check_killed(self) -> None:
        """Raise `TaskKilled` if the task was killed. For threads, which get no signals."""
        if self._is_killed:
            raise TaskKilled


@contextmanager
def task_scope(conn_id: str) -> Iterator[TaskScope]:
    """Yield the scope of a try. When the block ends, end the try's queries and cluster uses.

    If the worker shuts down, leave them to the next try. If the task is deferred, leave them to the
    trigger.

    Raises
    ------
    NotAuthenticatedError
        No task is running.
    """
    scope = TaskScope(conn_id)
    context = cast("dict[str, Any]", get_current_context())
    context[SCOPE] = scope
    # Set on the task, because during a deferral the context is gone before SIGTERM arrives.
    scope.task.on_kill = scope.on_kill
    scope.task.get_openlineage_facets_on_complete = scope.report_datasets
    if hidden := find_hidden_copies():
        logger.warning(
            "polars_remote is imported from %s, which hides %s: delete all but one",
            describe(FOLDER),
            ", ".join(hidden),
        )
    try:
        if is_resumed(get_current_context()):
            scope.entry.restore()
        elif context["ti"].try_number > 1:
            scope.entry.adopt_earlier_tries()
        yield scope
        scope.check_killed()  # the body may have caught TaskKilled
        scope.queries.check_awaited()
    except BaseException as error:
        if isinstance(error, Exception):
            add_advice(error, sorted(scope.task.upstream_task_ids))
        if scope.is_finished_by(error):
            scope.close(error)
        else:
            scope.detach()
        raise
    else:
        scope.close()


def find_scope() -> TaskScope | None:
    """Return the scope of the running task, or None if the task is not authenticated."""
    try:
        context = cast("dict[str, Any]", get_current_context())
    except RuntimeError:  # no task is running
        return None
    scope: TaskScope | None = context.get(SCOPE)
    return scope


def has_open_scope(conn_id: str) -> bool:
    """Return whether the running task has a scope, which all functions of the task share.

    A second scope would overwrite the entry of the first.

    Raises
    ------
    LoginRefusedError
        The scope is logged in with another Connection.
    """
    scope = find_scope()
    if scope is None or scope.queries.is_closed:
        return False
    if scope.session.conn_id != conn_id:
        raise LoginRefusedError(
            f"The Airflow Connection {conn_id!r} was not used, because the task is logged in with "
            f"{scope.session.conn_id!r}: use only one Connection in each task"
        )
    return True


def current_scope() -> TaskScope:
    """Return the scope of the running task.

    Raises
    ------
    NotAuthenticatedError
        The task is not authenticated.
    """
    scope = find_scope()
    if scope is None:
        raise NotAuthenticatedError(
            "This task is not authenticated: put @authenticate below @task or @query_task"
        )
    return scope
