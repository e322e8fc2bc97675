"""Wait in the worker until queries have ended, and check their results."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..cloud.client import get_query_id
from ..cloud.queries import describe
from ..cloud.retry import SIGNAL_SECONDS
from ..errors import QueryCanceledError, QueryLostError
from ..ownership.record import Result
from . import deferral
from .deferral import check_deadline
from .progress import Progress, describe_progress

if TYPE_CHECKING:
    from polars_cloud import DirectQuery, QueryResult

    from ..ownership.scope import TaskScope

logger = logging.getLogger(__name__)

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.5, 5.0
"""First and longest poll interval of the worker, in seconds."""

Resubmit = Callable[[str], "DirectQuery | None"]
"""Function that submits a query again if its cluster was stopped, or else returns None."""


def wait_until_ended(
    scope: TaskScope,
    queries: Mapping[str, DirectQuery],
    *,
    seconds: float = math.inf,
    resubmit: Resubmit = lambda name: None,
) -> dict[str, QueryResult]:
    """Wait until all queries have succeeded, one has not, or the seconds have passed.

    The wait is in Python, where Airflow's time-outs and signals reach the task.

    Returns
    -------
    dict
        Results of the queries that have ended, by name.
    """
    ends = time.monotonic() + seconds
    since = time.time()
    progress = Progress(since)
    pause = FIRST_POLL_SECONDS
    left = dict(queries)
    results: dict[str, QueryResult] = {}

    def end(name: str, result: QueryResult) -> None:
        if result.status.name == "FAILED" and (resubmitted := resubmit(name)):
            left[name] = resubmitted
        else:
            del left[name]
            results[name] = result

    with _long_polling(left) as (polled, has_ended):
        while True:
            while polled:
                name, result = polled.popitem()
                if name in left:
                    end(name, result)
            if not left or any(each.status.name != "SUCCESS" for each in results.values()):
                return results
            if _wait_for(has_ended, scope, min(pause, ends - time.monotonic())):
                has_ended.clear()
                continue
            pause = min(pause * 1.5, LONGEST_POLL_SECONDS)
            should_log = progress.should_log()
            for name, query in list(left.items()):
                status = scope.session.call(query.get_status)
                if status.is_done():
                    end(name, get_result(scope, query))
                elif should_log:
                    text = describe_progress(query, status, time.time() - since)
                    logger.info("Query %s: %s", get_query_id(query), text)
            if time.time() - since > deferral.IN_WORKER_SECONDS:
                scope.queries.cancel_adopted(excluding=queries)
            # After the poll, so that a task whose queries have ended is not deferred.
            if time.monotonic() >= ends:
                return results


def _wait_for(has_ended: threading.Event, scope: TaskScope, seconds: float) -> bool:
    """Wait up to these seconds; return whether a query has ended.

    Raises `TaskKilled` or `AirflowTaskTimeout`, also in threads, which get no signals.
    """
    ends = time.monotonic() + seconds
    while True:
        scope.check_killed()
        check_deadline(scope)
        left = max(ends - time.monotonic(), 0.0)
        if has_ended.wait(min(left, SIGNAL_SECONDS)):
            return True
        if left <= SIGNAL_SECONDS:
            return False


def get_result(scope: TaskScope, query: DirectQuery) -> QueryResult:
    """Return the result of a query that has succeeded, failed or was canceled."""
    return scope.session.call(lambda: query.await_result(raise_on_failure=False))


def check_result(scope: TaskScope, name: str, query: DirectQuery, result: QueryResult) -> None:
    """Log how the query ended. Raise if it has no result; the caller raises a failed query's error.

    Raises
    ------
    QueryCanceledError
        Somebody canceled the query.
    QueryLostError
        The query succeeded without a location, or failed without an error.
    """
    query_id = get_query_id(query)
    has_succeeded = result.status.name == "SUCCESS"
    scope.queries.mark_ended(query_id, to_result(result) if has_succeeded else None)
    record = scope.queries.get_record(name)
    if result.status.name == "FAILED":
        logger.error("Query failed: %s", describe(query))
        if not result.finished_task_info.errors:
            raise QueryLostError(f"Query {query_id} failed without an error")
    elif result.status.name == "CANCELED":
        raise QueryCanceledError(f"Somebody canceled this query: {describe(query)}")
    elif not result.location and (record is None or record.has_location):
        raise QueryLostError(
            f"This query succeeded, but its result has no location: {describe(query)}"
        )
    else:
        log_result(query_id, result.n_rows_total, result.location or [])


def to_result(result: QueryResult) -> Result:
    """Return the location and row count of a query's result."""
    return Result(location=result.location or [], rows=result.n_rows_total)


def log_result(query_id: str, rows: int | None, location: list[str]) -> None:
    """Log the rows and the location of a query that has succeeded.

    The task sees the end of a query later than Polars Cloud does. It logs no duration, because the
    query's page would show another one.
    """
    places = ", ".join(location) or "nowhere"
    logger.info("Query %s wrote %s rows to %s", query_id, rows, places)


def check_all_awaited(
    scope: TaskScope, names: Collection[str] | None = None, *, excluding: Collection[str] = ()
) -> None:
    """Raise if the task did not wait for one of its queries.

    Waits a few seconds first: if the query fails, its own error is raised.

    Raises
    ------
    QueryNotAwaitedError
        The task did not wait for the query.
    """
    forgotten = scope.queries.get_connected(set(scope.queries.get_unended(names)) - set(excluding))
    seconds = deferral.IN_WORKER_SECONDS
    for name, result in wait_until_ended(scope, forgotten, seconds=seconds).items():
        if result.status.name == "FAILED":
            check_result(scope, name, forgotten[name], result)
            result.raise_err()
    scope.queries.check_awaited(names, excluding=excluding)


@contextmanager
def _long_polling(
    queries: Mapping[str, DirectQuery],
) -> Iterator[tuple[dict[str, QueryResult], threading.Event]]:
    """Keep one long poll per query, which is answered when the query ends.

    Yields the results so far by name, and an event that is set when there is a new one. The worker
    also polls at intervals, because networks sometimes cut long polls.
    """
    polled: dict[str, QueryResult] = {}
    has_ended, is_closed = threading.Event(), threading.Event()

    def long_poll(name: str, query: DirectQuery) -> None:
        while not is_closed.is_set():
            try:
                result = query.await_result(raise_on_failure=False)
                if result.status.is_done():
                    polled[name] = result
                    break
            except Exception:
                pass  # if the error persists, the next poll at an interval raises it
            is_closed.wait(LONGEST_POLL_SECONDS)
        has_ended.set()

    for each in queries.items():
        threading.Thread(target=long_poll, args=each, name="polars-cloud-wait", daemon=True).start()
    try:
        yield polled, has_ended
    finally:
        is_closed.set()
