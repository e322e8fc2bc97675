"""Wait in the worker for queries to end, and get their results."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow.sdk import get_current_context

from .airflow_versions import AirflowFailException
from .client_internals import get_query_id
from .data_location import explain
from .deferral import check_deadline
from .login import call_polars_cloud
from .progress import Progress, describe_progress
from .recorded_queries import describe
from .task_scope import current_scope

if TYPE_CHECKING:
    from polars_cloud import DirectQuery, QueryResult

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two looks at a query, at first and when it has been running for a while."""


def wait_until_ended(
    queries: Sequence[DirectQuery], seconds: float = math.inf
) -> list[DirectQuery]:
    """Wait until all queries have succeeded; those that have not after these seconds.

    Looks from time to time, in Python: Airflow's time-outs and signals reach the task.

    Raises
    ------
    Exception
        As `get_result`, as soon as one of the queries has not succeeded.
    """
    scope = current_scope()
    ends = time.monotonic() + seconds
    since = time.time()
    progress = Progress(since)
    pause = FIRST_PAUSE
    left = list(queries)
    with _told_of_end(queries) as has_news:
        while True:
            tells = progress.is_due()
            for query in list(left):
                status = call_polars_cloud(query.get_status)
                if status.is_done():
                    left.remove(query)
                    if status.name != "SUCCESS":
                        get_result(query)  # raises what the task is to fail with
                elif tells:
                    text = describe_progress(query, status, time.time() - since)
                    logger.info("Query %s: %s", get_query_id(query), text)
            if not left or time.monotonic() >= ends:
                return left
            if scope.returns_queries:
                check_deadline(scope)
            has_news.wait(min(pause, ends - time.monotonic()))
            has_news.clear()
            pause = min(pause * 1.5, LONGEST_PAUSE)


def get_result(query: DirectQuery) -> QueryResult:
    """Return the result of a query that has ended; raises what `wait_for` raises."""
    from polars_cloud import QueryStatus

    name = describe(query)
    result = call_polars_cloud(lambda: query.await_result(raise_on_failure=False))
    current_scope().set_awaited(get_query_id(query))
    if result.status is QueryStatus.FAILED:
        logger.error("Query %s failed", name)
        _raise(result)
    if result.status is QueryStatus.CANCELED:
        raise AirflowFailException(f"Query {name} was canceled: nothing was written")
    if not result.location:
        raise RuntimeError(f"Query {name} succeeded but names no location of its result")
    log_result(get_query_id(query), result.n_rows_total, result.location)
    return result


def log_result(query_id: str, rows: int | None, location: list[str]) -> None:
    """Log what a query of this task has written."""
    scope = current_scope()
    record = scope.queries.get(scope.find_destination(query_id) or "", {})
    age = time.time() - record.get("submitted_at", time.time())
    places = ", ".join(location)
    logger.info("Query %s wrote %s rows to %s in %.1f s", query_id, rows, places, age)


@contextmanager
def _told_of_end(queries: Sequence[DirectQuery]) -> Iterator[threading.Event]:
    """Have an event set when a query ends, so that nobody pays for the pause between two looks.

    Polars Cloud holds the reply to `await_result` until then. A connection that is held for hours
    is cut at times: the reply is a hint, and the looks go on.
    """
    has_news, is_over = threading.Event(), threading.Event()

    def hold(query: DirectQuery) -> None:
        while not is_over.is_set():
            try:
                query.await_result(raise_on_failure=False)
                break
            except Exception:
                is_over.wait(LONGEST_PAUSE)
        has_news.set()

    for query in queries:
        threading.Thread(target=hold, args=(query,), name="polars-cloud-wait", daemon=True).start()
    try:
        yield has_news
    finally:
        is_over.set()


def _raise(result: QueryResult) -> None:
    try:
        result.raise_err()
    except Exception as error:
        if advice := explain(error):
            error.add_note(advice)
        elif isinstance(error, FileNotFoundError) and (
            tasks := sorted(get_current_context()["ti"].task.upstream_task_ids)
        ):
            error.add_note(
                "If this was the temporary result of another task, it has expired: "
                f"clear {' or '.join(tasks)}, which runs this task again as well"
            )
        raise
