"""Record, label, submit, resume, await and cancel the queries of a task."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

from .cloud.client import (
    connect_query,
    forget_cluster,
    get_client,
    get_cluster_id,
    get_cluster_status,
    get_query_client,
    get_query_id,
    get_result_info,
    get_status_code,
    is_own_cluster,
    list_queries,
    make_lineage,
    uses_proxy,
)
from .cloud.plans import Plan, read_plan, set_sink_uuid
from .cloud.queries import cancel_query, describe, get_page
from .cloud.retry import start_thread
from .cloud.session import CloudSession
from .errors import QueryRefusedError
from .links import link_to_query
from .ownership.labels import get_labels, get_lineage
from .ownership.lineage import add_datasets
from .ownership.record import QueryRecord
from .ownership.scope import TaskScope, current_scope
from .waiting.in_worker import check_result, wait_until_ended

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, DirectQuery, ProxyQuery

    from .cloud.client import QueryInfo

logger = logging.getLogger(__name__)

RESUBMIT_SECONDS = 30.0
"""Maximum age in seconds of a query that is submitted again after its cluster was stopped."""

if TYPE_CHECKING:
    Query = DirectQuery | ProxyQuery
else:
    Query = object  # importing it costs as much as Polars
"""Type of a submitted query, which a remote sink or `execute(blocking=False)` returns."""


def detach(query: DirectQuery) -> str:
    """Detach a query from its task, and return the query's id.

    The query keeps running when the task ends: nothing waits for the query or cancels it. Its
    cluster is left to the idle timeout. A later try of the task submits the query again.

    Parameters
    ----------
    query
        Query that was submitted on a context of `use_cluster`.

    Raises
    ------
    NotAuthenticatedError
        The task has no `@authenticate`.
    """
    scope, query_id = current_scope(), get_query_id(query)
    name = scope.queries.find_name(query_id)
    if name and (record := scope.queries.get_record(name)):
        scope.clusters.leave_to_idle_timeout(record.manifest)
    scope.queries.forget(query_id)
    return query_id


class RecordingClient:
    """Client of a context that records every query before it is submitted.

    Stands between the context and the client's own connection to the cluster. A query is canceled
    if its task fails, times out, or is marked or cleared before the query has ended. If only the
    worker ends, the query keeps running and the next try resumes it.

    If the reply to a submission is lost, the query is looked up by its destination before it is
    submitted again. Some queries cannot be looked up, and are simply submitted again: those with a
    temporary result or several destinations, and those that write to an Iceberg table, to which
    other tasks may append at the same time. Of two submissions to an Iceberg table, Polars commits
    only one.

    Parameters
    ----------
    ctx
        Context of the cluster.
    manifest
        Name of the cluster's manifest, or the URI of a cluster of your own.
    start
        Function that starts the context's cluster unless it is running, and waits until it accepts
        queries. Called before each submission.
    """

    def __init__(
        self,
        scope: TaskScope,
        ctx: ComputeContext,
        manifest: str,
        start: Callable[[ComputeContext], None],
    ) -> None:
        self._scope = scope
        self._ctx = ctx
        self._manifest = manifest
        self._start = start
        self._is_open = True
        self._starting = threading.Lock()
        self._known: dict[str, list[tuple[str, str | None]]] = {}
        """Ids and destinations of earlier queries, by cluster id."""
        self._queries: dict[str, tuple[str, DirectQuery]] = {}
        """Name and query by query id; the queries use the client's own connection."""
        self._submit_again: dict[str, Callable[[], DirectQuery]] = {}
        """Functions that submit a query again, by name."""
        self._canceled: set[str] = set()
        self.names: set[str] = set()
        """Names of queries that were resumed, submitted, or may have been submitted."""

    def close(self) -> None:
        """Refuse further queries, because the context's `use_cluster` block has ended."""
        self._is_open = False

    # Methods that the client calls

    def do_query(
        self,
        *,
        plan: bytes,
        settings: Any,
        labels: list[str] | None,
        execution_id: str | None,
        lineage_context: Any,
    ) -> UUID:
        """Submit a query once, or resume the one that an earlier try has submitted; return its id.

        Raises
        ------
        QueryRefusedError
            The query cannot be recorded, or its cluster cannot write to the destination.
        Exception
            Polars Cloud did not accept the query.
        """
        found = read_plan(plan)
        _check_destinations(found)
        if found.returns_to_client and uses_proxy(self._ctx):
            raise QueryRefusedError(
                "The query was not submitted, because explain needs a direct connection to the "
                "cluster, which proxy mode does not have: use connection_mode direct"
            )
        tables = (table.name for table in found.tables)
        name = self._scope.queries.reserve_name((*found.destinations, *tables), found.digest)
        try:
            self._check_open(name)
            query = self._resume(name, found)
            if query is None:
                labels = [*(labels or []), *get_labels()]
                plan = self._mark_appends(plan, found)
                if lineage_context is None and is_own_cluster(self._manifest):
                    lineage_context = make_lineage(**get_lineage())

                def submit() -> DirectQuery:
                    query_id = get_query_client(self._ctx).do_query(
                        plan=plan,
                        settings=settings,
                        labels=labels,
                        execution_id=execution_id,
                        lineage_context=lineage_context,
                    )
                    return connect_query(str(query_id), self._ctx)

                query = self._submit_once(name, found, submit)
                try:
                    self._check_open(name)
                except QueryRefusedError:  # the block ended while a thread submitted the query
                    cancel_query(self._scope.session, query)
                    raise
                self._submit_again[name] = lambda: self._submit_once(
                    name, found, submit, again=True
                )
                logger.info("Submitted query %s", describe(query))
        except BaseException:
            self._scope.queries.release_name(name)
            raise
        self._queries[get_query_id(query)] = name, query
        return UUID(get_query_id(query))

    def get_direct_query_status(self, query_id: UUID) -> Any:
        _, query = self._queries[str(query_id)]
        return self._scope.session.call(get_status_code, query)

    def get_direct_query_result(self, query_id: UUID, timeout_ms: int) -> QueryInfo:
        """Wait for the query and return its result. Time-outs and signals interrupt the wait.

        Raises
        ------
        TimeoutError
            The query has not ended within `timeout_ms`.
        QueryCanceledError, QueryLostError
            The query ended without a result. The client raises the error of a failed query.
        """
        name, query = self._queries[str(query_id)]
        results = wait_until_ended(
            self._scope, {name: query}, seconds=timeout_ms / 1000, resubmit=self.submit_again
        )
        if name not in results:
            raise TimeoutError("timed out waiting for the query result")
        _, query = self._queries[str(query_id)]
        if results[name].status.name == "CANCELED" and str(query_id) in self._canceled:
            self._scope.queries.mark_ended(get_query_id(query))
        else:
            check_result(self._scope, name, query, results[name])
        self._submit_again.pop(name, None)
        record = self._scope.queries.get_record(name)
        if results[name].status.name != "SUCCESS" and record and record.query_id == str(query_id):
            self._scope.queries.release_name(name)  # the task may submit it again
        return get_result_info(results[name])

    def cancel_direct_query(self, query_id: UUID) -> None:
        self._canceled.add(str(query_id))
        _, query = self._queries[str(query_id)]
        self._scope.session.call(query.cancel)

    def __getattr__(self, name: str) -> Any:
        return getattr(get_query_client(self._ctx), name)

    # How a query is submitted

    def submit_again(self, name: str) -> DirectQuery | None:
        """Submit a query again, once, if its cluster was stopped during the submission.

        The cluster's last user may stop it at the moment in which this task submits the query.
        Returns None if the query is not submitted again.
        """
        submit = self._submit_again.pop(name, None)
        record = self._scope.queries.get_record(name)
        if submit is None or record is None or record.submitted_at is None:
            return None
        if time.time() - record.submitted_at > RESUBMIT_SECONDS or not self._was_stopped(record):
            return None
        logger.warning(
            "Cluster %s was stopped while query %s was submitted; submitting the query again",
            record.cluster_id,
            record.query_id,
        )
        forget_cluster(self._ctx)
        query = submit()
        link_to_query(self._scope.task, get_page(query), instead_of=record.page)
        for query_id, (each, _) in list(self._queries.items()):
            if each == name:
                self._queries[query_id] = name, query
        return query

    def _was_stopped(self, record: QueryRecord) -> bool:
        if is_own_cluster(record.cluster_id):
            return False
        session = self._scope.session
        workspace = session.find_workspace()
        status, reason = session.call(get_cluster_status, record.cluster_id, workspace)
        return status in ("STOPPING", "STOPPED") and not reason

    def _check_open(self, name: str, *, again: bool = False) -> None:
        # A returned query may be submitted again after its block: the task still uses the cluster.
        if self._scope.queries.is_closed or not (self._is_open or again):
            raise QueryRefusedError(
                f"The query for {name} was not submitted, because the use_cluster block of its "
                "context has ended: submit it inside the block"
            )

    def _mark_appends(self, plan: bytes, found: Plan) -> bytes:
        """Return the plan with sink UUIDs, so that Polars appends once even if submitted twice.

        Other sinks can be written twice without harm.
        """
        for table in found.tables:
            if table.is_appended_to:
                sink_uuid = self._scope.get_sink_uuid(table.name)
                plan = set_sink_uuid(plan, table, sink_uuid)
                logger.info("Snapshot of %s has polars.sink-uuid %s", table.name, sink_uuid)
        return plan

    def _resume(self, name: str, plan: Plan) -> DirectQuery | None:
        query = self._scope.queries.find_resumable(name)
        if query is not None:
            record = self._scope.record.queries[name]
            logger.info("Resuming query of try %d: %s", record.try_number, describe(query))
            record.query_id, record.page = get_query_id(query), get_page(query)
            record.submitted_at = record.submitted_at or time.time()
            add_datasets(record, plan)
            self.names.add(name)
            self._scope.queries.record_query(name, record, query)
            link_to_query(self._scope.task, record.page)
        return query

    def _submit_once(
        self, name: str, plan: Plan, submit: Callable[[], DirectQuery], *, again: bool = False
    ) -> DirectQuery:
        scope, ctx = self._scope, self._ctx
        destination = plan.destinations[0] if len(plan.destinations) == 1 else ""
        for may_have_stopped in (True, False):
            with self._starting:
                # A cluster that is started after the block would not be stopped.
                self._check_open(name, again=again)
                self._start(ctx)
            self._check_open(name, again=again)
            record = QueryRecord(
                cluster_id=get_cluster_id(ctx) or "",
                manifest=self._manifest,
                known=self._find_known(destination),
                destination=destination,
                has_location=plan.has_location,
            )
            add_datasets(record, plan)
            scope.queries.record_query(name, record)
            self.names.add(name)
            try:
                query = self._submit_unless_accepted(record, submit)
                break
            except Exception:
                if not may_have_stopped or scope.session.call(ctx.get_status).is_available():
                    raise
                logger.warning(
                    "Cluster %s stopped before it accepted the query; starting another one",
                    record.cluster_id,
                )
                forget_cluster(ctx)
        record.query_id, record.page = get_query_id(query), get_page(query)
        record.submitted_at = time.time()
        self._known[record.cluster_id].append((record.query_id, destination))
        scope.queries.record_query(name, record, query)
        link_to_query(scope.task, record.page)
        return query

    def _submit_unless_accepted(
        self, record: QueryRecord, submit: Callable[[], DirectQuery]
    ) -> DirectQuery:
        submission = _Submission(self._scope.session, self._ctx, record, submit)
        chosen: DirectQuery | None = None
        try:
            chosen = self._scope.session.call(submission.attempt)
        finally:
            submission.cancel_duplicates(chosen)
        return chosen

    def _find_known(self, destination: str) -> list[str]:
        """Return the ids of earlier queries with this destination on the cluster.

        Every other query with this destination is the new one. Unlike times, ids need no
        synchronized clocks.
        """
        cluster_id = get_cluster_id(self._ctx) or ""
        if destination and cluster_id not in self._known:
            self._known[cluster_id] = self._scope.session.call(
                lambda: list(list_queries(self._ctx))
            )
        queries = self._known.setdefault(cluster_id, [])
        return [query_id for query_id, uri in queries if uri == destination]


class _Submission:
    """Submission of a query, with retries; cancels duplicates.

    An attempt that was abandoned without a reply may still be accepted much later.
    """

    def __init__(
        self,
        session: CloudSession,
        ctx: ComputeContext,
        record: QueryRecord,
        submit: Callable[[], DirectQuery],
    ) -> None:
        self._session = session
        self._ctx = ctx
        self._record = record
        self._submit = submit
        self._was_tried = False
        self._lock = threading.Lock()
        self._accepted: list[DirectQuery] = []
        self._has_ended = False
        self._chosen_id = ""

    def attempt(self) -> DirectQuery:
        """Submit the query, unless an earlier attempt was accepted; return the query."""
        if self._was_tried and (found := self._find_accepted()):
            logger.info(
                "The query was accepted although the reply was lost, continuing with it: %s",
                describe(found),
            )
            return found
        self._was_tried = True
        query = self._submit()
        with self._lock:
            self._accepted.append(query)
            is_late = self._has_ended and get_query_id(query) != self._chosen_id
        if is_late:
            self._cancel(query)
        return query

    def cancel_duplicates(self, chosen: DirectQuery | None) -> None:
        """Cancel all accepted queries except `chosen`, now or when their replies arrive.

        Parameters
        ----------
        chosen
            Query to keep; None if the caller was interrupted. Then a query with a destination is
            not canceled, because the next try can find it.
        """
        with self._lock:
            self._has_ended = True
            self._chosen_id = get_query_id(chosen) if chosen else ""
            accepted = list(self._accepted)
        if chosen or not self._record.destination:
            for query in accepted:
                if get_query_id(query) != self._chosen_id:
                    start_thread(functools.partial(self._cancel, query))

    def _find_accepted(self) -> DirectQuery | None:
        with self._lock:
            if self._accepted:
                return self._accepted[0]
        if self._record.destination:
            for query_id, uri in list_queries(self._ctx):
                if uri == self._record.destination and query_id not in self._record.known:
                    return connect_query(query_id, self._ctx)
        return None

    def _cancel(self, query: DirectQuery) -> None:
        try:
            cancel_query(self._session, query)
        except Exception as error:
            logger.warning("Could not cancel a query (%s): %s", error, describe(query))


def get_recording_client(query: DirectQuery) -> RecordingClient | None:
    """Return the client that recorded the query, or None if the query was not recorded."""
    client = get_client(query)
    return client if isinstance(client, RecordingClient) else None


def _check_destinations(plan: Plan) -> None:
    for destination in plan.destinations:
        url = urlsplit(destination)
        if not url.netloc or url.scheme in ("", "file"):
            raise QueryRefusedError(
                f"The query was not submitted, because its cluster cannot write to "
                f"{destination!r}: give a URI such as s3://bucket/report.parquet"
            )
