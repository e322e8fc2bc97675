"""Submit a query once, whatever happens to the task, and make its end the task's end."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

from .client_internals import (
    connect_query,
    forget_cluster,
    get_cluster_id,
    get_destination,
    get_manifest_name,
    get_query_id,
    with_labels,
)
from .clusters import start_and_wait
from .labels import get_labels
from .login import call_polars_cloud
from .recorded_queries import (
    describe,
    find_new_query,
    find_query,
    find_query_ids,
    find_status,
    get_page,
)
from .task_scope import TaskScope, current_scope
from .waiting import get_result, wait_until_ended

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, DirectQuery, QueryResult

logger = logging.getLogger(__name__)

P = ParamSpec("P")

if TYPE_CHECKING:
    Query = DirectQuery
else:
    Query = object  # importing it costs as much as Polars
"""What `submit` returns: a `polars_cloud.DirectQuery`."""

METHODS = ("execute", "sink_csv", "sink_ipc", "sink_parquet")


def run_query(method: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> QueryResult:
    """Submit a query and wait until it has written its result: `wait_for(submit(...))`.

    Examples
    --------
    >>> run_query(lf.remote(ctx).sink_parquet, "s3://bucket/report.parquet").location
    ['s3://bucket/report.parquet']
    >>> run_query(lf.remote(ctx).single_node().execute).location  # a temporary result
    """
    return wait_for(submit(method, *args, **kwargs))


def submit(method: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> DirectQuery:
    """Submit the query `method(*args, **kwargs)` once, whatever happens to this task.

    The query ends with the task: it is canceled when the task fails, is marked, cleared or runs
    out of time before the query has ended. When only the worker ends, the query runs on and the
    next try resumes it. When the reply is lost, the query is found by its destination before it is
    submitted a second time; a temporary result has none, and its query is then submitted again.

    Parameters
    ----------
    method
        `execute`, `sink_parquet`, `sink_csv` or `sink_ipc` of what `.remote(ctx)`,
        `.remote(ctx).single_node()` or `.remote(ctx).distributed()` gives: the method itself, not
        called. `execute` writes a temporary result, which Polars Cloud deletes by itself.
    args, kwargs
        Its arguments. A destination that is a directory keeps the files that an earlier try or run
        has written there: give each run a directory of its own.

    Raises
    ------
    TypeError
        `method` is none of these.
    ValueError
        The task writes to this destination already, or the context is not in direct mode, the
        client's default, or has neither a name nor a cluster.
    Exception
        Polars Cloud did not accept the query; it runs nowhere.
    """
    from polars_cloud import DirectQuery

    if isinstance(method, DirectQuery):
        method.cancel()
        raise TypeError("submit takes the method itself, as in submit(remote.sink_parquet, uri)")
    remote, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if name not in METHODS or not hasattr(remote, "lf"):
        raise TypeError(f"submit takes {', '.join(METHODS)} of a remote query, not {method!r}")
    assert remote is not None
    ctx = remote.context
    if (mode := getattr(ctx, "connection_mode", None)) != "direct":
        raise ValueError(f"submit needs a ComputeContext in direct connection mode, not {mode}")
    if get_cluster_id(ctx) is None and get_manifest_name(ctx) is None:
        raise ValueError(
            "This ComputeContext has no name by which its cluster could be found again: "
            "make it with use_cluster or compute_context"
        )

    scope = current_scope()
    if name == "execute":
        kwargs["blocking"] = False
        destination, is_temporary = _name_temporary_result(scope, remote.lf.serialize()), True
    else:
        target = args[0] if args else kwargs["uri"]
        destination, is_temporary = get_destination(target), False
        if scope.is_claimed(destination):
            raise ValueError(
                f"Two queries of this task write to {destination}: the one with id "
                f"{scope.queries[destination].get('query_id')} and the one that was about to be "
                "submitted. Give each a destination of its own"
            )
    if query := _resume(scope, destination):
        return query

    labeled = with_labels(remote, get_labels())
    submission = functools.partial(getattr(labeled, name), *args, **kwargs)
    query = _submit_once(scope, ctx, destination, is_temporary, submission)
    logger.info("Submitted query %s", describe(query))
    return query


def wait_for(query: DirectQuery) -> QueryResult:
    """Wait until the query has written its result.

    Parameters
    ----------
    query
        What `submit` gave.

    Returns
    -------
    polars_cloud.QueryResult
        Its `location` is a list of URIs, for the next task to scan; `n_rows_total` counts the rows.

    Raises
    ------
    Exception
        The query's own exception, such as `polars.exceptions.ColumnNotFoundError`, if it failed.
    AirflowFailException
        Somebody canceled the query; it is not submitted again.
    RuntimeError
        It succeeded without saying where its result is.
    """
    wait_until_ended([query])
    return get_result(query)


def leave(query: DirectQuery) -> str:
    """Let the query run on without anybody who waits for it or ends it, and return its id."""
    query_id = get_query_id(query)
    current_scope().release(query_id)
    return query_id


def _name_temporary_result(scope: TaskScope, plan: bytes) -> str:
    """What stands in for the destination of a query that has none: its plan, and its turn.

    A try whose code has changed does not resume the query of another plan.
    """
    digest = hashlib.sha256(plan).hexdigest()[:16]
    turn = 1
    while scope.is_claimed(name := f"temporary result {digest}, {turn}"):
        turn += 1
    return name


def _resume(scope: TaskScope, destination: str) -> DirectQuery | None:
    """The query of an earlier try, unless there is none or it will never succeed."""
    record = scope.queries.get(destination)
    if record is None or (query := find_query(destination, record)) is None:
        return None
    status = find_status(query)
    if status is None or (status.is_done() and status.name != "SUCCESS"):
        return None
    logger.info("Resuming query %s, submitted by try %d", describe(query), record["try_number"])
    _claim_submitted(scope, destination, record, query)
    return query


def _submit_once(
    scope: TaskScope,
    ctx: ComputeContext,
    destination: str,
    is_temporary: bool,
    submission: Callable[[], DirectQuery],
) -> DirectQuery:
    record: dict[str, Any] = {}
    tried = False

    def submit_unless_accepted() -> DirectQuery:
        nonlocal tried
        if tried and not is_temporary:
            query_id = find_new_query(ctx, destination, record["known"])
            if query_id is not None:
                query = connect_query(query_id, ctx)
                logger.info(
                    "The query had been accepted although the reply was lost: continuing with %s",
                    describe(query),
                )
                return query
        tried = True
        return submission()

    for may_have_stopped in (True, False):
        if get_cluster_id(ctx) is None:
            start_and_wait(ctx)
        record = {
            "cluster_id": get_cluster_id(ctx),
            "manifest": get_manifest_name(ctx),
            # No clock is asked: whatever the cluster has now is not the query to come.
            "known": [] if is_temporary else find_query_ids(ctx, destination),
        }
        scope.claim(destination, record)
        try:
            query = call_polars_cloud(submit_unless_accepted)
            break
        except Exception:
            can_restart = may_have_stopped and get_manifest_name(ctx) is not None
            if not can_restart or call_polars_cloud(ctx.get_status).is_available():
                raise
            logger.warning("Cluster %s has stopped: starting it again", get_cluster_id(ctx))
            forget_cluster(ctx)
            tried = False
    _claim_submitted(scope, destination, record, query)
    return query


def _claim_submitted(
    scope: TaskScope, destination: str, record: dict[str, Any], query: DirectQuery
) -> None:
    found = {"query_id": get_query_id(query), "page": get_page(query)}
    scope.claim(destination, {"submitted_at": time.time(), **record, **found}, query)
