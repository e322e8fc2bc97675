"""Find a query that is on record again, and end it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .client_internals import (
    connect_query,
    frontend_domain,
    get_cluster_id,
    get_context,
    get_query_id,
    list_queries,
    not_found_error,
)
from .login import call_polars_cloud
from .settings import PORTAL, WORKSPACE

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, DirectQuery, QueryStatus

logger = logging.getLogger(__name__)

NOT_FOUND = "Error calling gRPC endpoint, Some requested entity was not found"


def find_live_cluster(cluster_id: str) -> ComputeContext | None:
    """Return the cluster's context, or None if it has stopped or was never there."""
    from polars_cloud import ComputeContext

    try:
        return call_polars_cloud(lambda: ComputeContext.connect(cluster_id, workspace=WORKSPACE))
    except not_found_error():
        return None
    except RuntimeError as error:
        if "incorrect state" not in str(error):
            raise
        return None


def find_query(destination: str, record: dict[str, Any]) -> DirectQuery | None:
    """The query that was submitted, if its cluster is live.

    A query whose reply was lost has no id on record. It is the one with this destination that its
    cluster did not have before; a temporary result has no destination, and is not found.
    """
    ctx = find_live_cluster(record["cluster_id"])
    if ctx is None:
        return None
    query_id = record.get("query_id") or find_new_query(ctx, destination, record["known"])
    return None if query_id is None else call_polars_cloud(connect_query, query_id, ctx)


def find_new_query(ctx: ComputeContext, destination: str, known: list[str]) -> str | None:
    """Id of the query with this destination that is not among the known ones."""
    new = [query_id for query_id in find_query_ids(ctx, destination) if query_id not in known]
    return new[-1] if new else None


def find_query_ids(ctx: ComputeContext, destination: str) -> list[str]:
    """Ids of the cluster's queries with this destination, oldest first."""
    listed = call_polars_cloud(lambda: list(list_queries(ctx)))
    return [query_id for query_id, location in listed if location == destination]


def find_status(query: DirectQuery) -> QueryStatus | None:
    """Return the query's status, or None if its cluster does not know it."""
    try:
        return call_polars_cloud(query.get_status)
    except RuntimeError as error:
        if NOT_FOUND not in str(error):
            raise
        return None


def end_query(query: DirectQuery) -> bool:
    """Cancel the query unless it has ended; whether it has. What goes wrong is logged."""
    is_canceled = False

    def cancel_unless_ended() -> None:
        nonlocal is_canceled
        try:
            if query.get_status().is_done():
                return
        except Exception as error:
            if NOT_FOUND in str(error):
                return
            if is_canceled:
                raise
        query.cancel()  # quiet about every error
        is_canceled = True
        if not query.get_status().is_done():
            raise TimeoutError("it is still running")

    try:
        call_polars_cloud(cancel_unless_ended)
    except Exception as error:
        logger.error("Query %s could not be canceled: %s", describe(query), error)
        return False
    if is_canceled:
        logger.info("Canceled query %s", describe(query))
    return True


def end_recorded_query(destination: str, record: dict[str, Any]) -> bool:
    """Find the query and cancel it unless it has ended; whether it has."""
    query = find_query(destination, record)
    return query is None or end_query(query)


def describe(query: DirectQuery) -> str:
    """Return the query's id and the link to its page."""
    return f"{get_query_id(query)} ({get_page(query)})"


def get_page(query: DirectQuery) -> str:
    """The address of the query's page on Polars Cloud."""
    ctx = get_context(query)
    portal = PORTAL or f"https://{frontend_domain()}"
    return f"{portal}/portal/{ctx.workspace.id}/{get_cluster_id(ctx)}/queries/{get_query_id(query)}"
