"""Submit a query to Polars Cloud once, and make its end the task's end."""

from __future__ import annotations

import copy
import logging
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from airflow.sdk import get_current_context
from airflow.sdk.exceptions import AirflowFailException

from include.kills import GRACE, unwind_when_killed
from include.labels import get_labels
from include.live_clusters import find_live_cluster
from include.outages import call

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, QueryStatus
    from polars_cloud.query import DirectQuery
    from polars_cloud.query.ext import ExecuteRemote, LazyFrameRemote

logger = logging.getLogger(__name__)

SUBMISSIONS = "polars_cloud_submissions"
"""Key in the task state store: by destination, what the next try needs to find this one's query."""

QUERIES = "polars_cloud_queries"
"""Key of the XCom by which queries are found that outlived their task."""

LONGEST_PAUSE = 5.0
"""Seconds between two looks at a query that has been running for a while."""


def submit(remote: LazyFrameRemote | ExecuteRemote, uri: str, **sink_options: Any) -> DirectQuery:
    """Do `remote.sink_parquet(uri, **sink_options)` once, whatever happens to this task.

    The query carries labels for DAG, task, run and try. Where it was submitted to is kept in
    Airflow's task state store, from before the submission until `wait_for` or `leave` is through:
    a next try goes on with the query of one whose worker died, unless that query failed, and a
    submission that was not answered is looked for among the cluster's queries before it is
    repeated. What it is recognized by is its destination and time: no two tasks should share a
    destination, and the worker's clock be right.

    Parameters
    ----------
    remote
        What `.remote(ctx)`, `.remote(ctx).single_node()` and their like give.
    uri
        Where the result is to go: a file, or with a `/` at the end a directory, in which each try
        writes a directory of its own.
    sink_options
        As `sink_parquet` takes them.

    Raises
    ------
    ValueError
        The context is not in direct mode, the client's default.
    Exception
        Polars Cloud did not take the query; it runs nowhere.
    """
    if (mode := getattr(remote.context, "connection_mode", None)) != "direct":
        raise ValueError(f"submit needs a ComputeContext in direct connection mode, not {mode}")
    unwind_when_killed()
    context = get_current_context()
    store: Any = context["task_state_store"]
    submissions: dict[str, Any] = store.get(SUBMISSIONS) or {}
    submission: Any = submissions.get(uri)
    query = _resume(submission)
    if query is None:
        remote = copy.copy(remote)
        ctx: Any = remote.context
        if submission and ctx._compute_id is None:
            # What an earlier try has started is not to run a second time.
            ctx = call(find_live_cluster, submission["cluster_id"]) or ctx
            remote.context = ctx
        call(ctx.start, timeout=None)
        submission = {
            "cluster_id": str(ctx._compute_id),
            # A directory of its own for each try: one never reads what another has left there.
            "destination": f"{uri}{context['ti'].id}/" if uri.endswith("/") else uri,
            "not_before": datetime.now(UTC).isoformat(),
        }
        store.set(SUBMISSIONS, {**submissions, uri: submission})
        remote._labels = [*(remote._labels or []), *get_labels()]
        query = _submit_once(remote, submission, sink_options)
        logger.info("Submitted query %s", describe(query))
    try:
        submissions[uri] = {**submission, "query_id": str(query._query_id)}
        store.set(SUBMISSIONS, submissions)
        context["ti"].xcom_push(QUERIES, [s for s in submissions.values() if "query_id" in s])
    except BaseException:
        cancel(query)
        raise
    return query


def wait_for(query: DirectQuery) -> list[str]:
    """Wait until the query has written its result, and cancel it if the task ends before.

    Parameters
    ----------
    query
        What `submit` gave.

    Returns
    -------
    list[str]
        URIs of the result, for the next task to scan.

    Raises
    ------
    Exception
        The query's own exception, such as `polars.exceptions.ColumnNotFoundError`, if it failed.
    AirflowFailException
        Somebody canceled the query; it is not submitted again.
    RuntimeError
        It succeeded without saying where its result is.
    """
    from polars_cloud import QueryStatus

    pause = 0.1
    try:
        # Not await_result(): one call held for hours fails with the first connection that is cut.
        while not call(query.get_status).is_done():
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)
    except BaseException:  # Airflow's execution time-out and its kill are no Exception
        cancel(query)
        raise

    name = describe(query)
    result = call(lambda: query.await_result(raise_on_failure=False))
    if result.status is QueryStatus.FAILED:
        logger.error("Query %s failed", name)
        result.raise_err()
    if result.status is QueryStatus.CANCELED:
        raise AirflowFailException(f"Query {name} was canceled: nothing was written")
    if not result.location:
        raise RuntimeError(f"Query {name} succeeded but names no location of its result")
    logger.info("Query %s wrote %s rows to %s", name, result.n_rows_total, result.location)
    _forget(query)
    return result.location


def leave(query: DirectQuery) -> str:
    """Let the query run on without anybody who waits for it, and return its id."""
    _forget(query)
    return str(query._query_id)


def cancel(query: DirectQuery) -> None:
    """Cancel the query and see that it has ended; what goes wrong is logged, not raised."""

    canceled = False

    def see_to_its_end() -> None:
        nonlocal canceled
        try:
            if query.get_status().is_done():
                return
        except Exception:
            if canceled:
                raise
        query.cancel()  # quiet about every error
        canceled = True
        if not query.get_status().is_done():
            raise TimeoutError("it is still running")

    try:
        call(see_to_its_end, timeout=GRACE / 2, budget=GRACE)
        logger.info("Canceled query %s", describe(query))
    except Exception as error:
        logger.error("Query %s could not be canceled: %s", describe(query), error)


def describe(query: DirectQuery) -> str:
    """Return the query's id and the link to its page."""
    from polars_cloud.constants import FRONTEND_DOMAIN

    ctx: Any = query._cluster
    query_id = query._query_id
    page = f"portal/{ctx.workspace.id}/{ctx._compute_id}/queries/{query_id}"
    return f"{query_id} (https://{FRONTEND_DOMAIN}/{page})"


def connect(query_id: str, ctx: ComputeContext) -> DirectQuery:
    """Take up a query by its id, on the cluster where it was submitted."""
    from polars_cloud.query import DirectQuery

    client = ctx._get_direct_client()
    assert client is not None, "only in proxy mode, which has no such queries"
    return DirectQuery(UUID(query_id), client, ctx)


def find_status(query: DirectQuery) -> QueryStatus | None:
    """Return the query's status, or None if its cluster does not know it."""
    try:
        return call(query.get_status)
    except RuntimeError as error:
        if "Some requested entity was not found" not in str(error):
            raise
        return None


def _submit_once(
    remote: LazyFrameRemote | ExecuteRemote,
    submission: dict[str, str],
    sink_options: dict[str, Any],
) -> DirectQuery:
    tried = False

    def submit_unless_found() -> DirectQuery:
        nonlocal tried
        if tried and (query := _find(submission)):
            logger.info("The submission had been taken without an answer")
            return query
        tried = True
        submitted = remote.sink_parquet(submission["destination"], **sink_options)
        return cast("DirectQuery", submitted)

    try:
        return call(submit_unless_found)
    except BaseException:
        with suppress(Exception):
            if query := call(_find, submission, timeout=GRACE / 2, budget=GRACE):
                cancel(query)
        raise


def _resume(submission: dict[str, str] | None) -> DirectQuery | None:
    """The query of an earlier try, unless there is none or it will never succeed."""
    if submission is None or (query := call(_find, submission)) is None:
        return None
    status = find_status(query)
    if status is None or (status.is_done() and status.name != "SUCCESS"):
        return None
    logger.info("Going on with query %s of an earlier try", describe(query))
    return query


def _find(submission: dict[str, str]) -> DirectQuery | None:
    """The submitted query, if its cluster is live and knows it."""
    from polars_cloud.constants import API_CLIENT

    ctx = find_live_cluster(submission["cluster_id"])
    if ctx is None:
        return None
    if "query_id" in submission:
        return connect(submission["query_id"], ctx)
    found = [
        query
        for query in API_CLIENT.get_queries(ctx.workspace.id)
        if str(query.cluster_id) == submission["cluster_id"]
        and query.output_location == submission["destination"]
        and query.request_time >= datetime.fromisoformat(submission["not_before"])
    ]
    if not found:
        return None
    return connect(str(max(found, key=lambda query: query.request_time).id), ctx)


def _forget(query: DirectQuery) -> None:
    """A task that is cleared after this submits the query anew."""
    store: Any = get_current_context()["task_state_store"]
    submissions = {
        uri: submission
        for uri, submission in (store.get(SUBMISSIONS) or {}).items()
        if submission.get("query_id") != str(query._query_id)
    }
    store.set(SUBMISSIONS, submissions)
