"""Wait for a query on Polars Cloud so that its end becomes the task's end.

Needs nothing else of `include/`.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polars_cloud.query import DirectQuery, ProxyQuery

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 5.0
"""Seconds between two looks at a query that has been running for a while."""


def wait_for(query: DirectQuery | ProxyQuery) -> list[str]:
    """Wait until the query has written its result.

    Parameters
    ----------
    query
        What `.remote(ctx).sink_parquet(...)` and its like give.

    Returns
    -------
    list[str]
        URIs of the result, for the next task to scan.

    Raises
    ------
    Exception
        The query's own exception, such as `polars.exceptions.ColumnNotFoundError`, if it failed.
    RuntimeError
        The query was canceled, or succeeded without saying where its result is.
    """
    from polars_cloud import QueryStatus

    query_id = query._query_id
    logger.info("Waiting for query %s", query_id)
    pause = 0.1
    try:
        # Not await_result(): it blocks in native code, where no time-out and no signal arrives.
        while not query.get_status().is_done():
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)
    except BaseException:  # Airflow's execution time-out is not an Exception
        query.cancel()
        raise

    result = query.await_result()
    if result.status is not QueryStatus.SUCCESS:
        raise RuntimeError(f"Query {query_id} ended as {result.status.name}: nothing was written")
    if not result.location:
        raise RuntimeError(f"Query {query_id} succeeded but names no location of its result")
    logger.info(
        "Query %s wrote %s rows to %s", query_id, result.n_rows_total, ", ".join(result.location)
    )
    return result.location
