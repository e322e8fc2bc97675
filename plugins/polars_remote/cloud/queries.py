"""Find and cancel submitted queries."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..settings import PORTAL
from .client import (
    connect_own_cluster,
    connect_query,
    frontend_domain,
    get_cluster_id,
    get_context,
    get_query_id,
    is_own_cluster,
    list_queries,
    not_found_error,
)
from .session import CloudSession, find_access

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, DirectQuery, QueryStatus

logger = logging.getLogger(__name__)

NOT_FOUND = "Error calling gRPC endpoint, Some requested entity was not found"


def find_live_cluster(session: CloudSession, cluster_id: str) -> ComputeContext | None:
    """Return the cluster's context, or None if the cluster has stopped or does not exist."""
    from polars_cloud import ComputeContext

    if is_own_cluster(cluster_id):
        return open_own_cluster(session, cluster_id)

    workspace = session.find_workspace()
    try:
        return session.call(lambda: ComputeContext.connect(cluster_id, workspace=workspace))
    except not_found_error():
        return None
    except RuntimeError as error:
        if "incorrect state" not in str(error):
            raise
        return None


def open_own_cluster(session: CloudSession, uri: str) -> ComputeContext:
    """Return the context of a cluster of your own, with the access in the Connection's extra.

    Raises
    ------
    LoginRefusedError
        The Connection is missing, or its extra is invalid.
    Exception
        The cluster is unreachable.
    """
    access = find_access(session.conn_id)
    if isinstance(access, Exception):
        raise access
    return session.call(connect_own_cluster, uri, access)


def find_query(
    session: CloudSession,
    cluster_id: str,
    query_id: str | None,
    destination: str,
    known: list[str],
) -> DirectQuery | None:
    """Return a submitted query, or None if its cluster has stopped or has no such query.

    Parameters
    ----------
    query_id
        None if the reply to the submission was lost.
    destination
        URI by which a query without an id is found; empty for a temporary result.
    known
        Ids of queries with this destination that the cluster had before the submission.
    """
    ctx = find_live_cluster(session, cluster_id)
    if ctx is None:
        return None
    query_id = query_id or find_new_query(session, ctx, destination, known)
    return None if query_id is None else session.call(connect_query, query_id, ctx)


def find_new_query(
    session: CloudSession, ctx: ComputeContext, destination: str, known: list[str]
) -> str | None:
    """Return the id of the query with this destination that is not among the known ones."""
    if not destination:
        return None
    listed = session.call(lambda: list(list_queries(ctx)))
    new = [each for each, uri in listed if uri == destination and each not in known]
    return new[-1] if new else None


def find_status(session: CloudSession, query: DirectQuery) -> QueryStatus | None:
    """Return the query's status, or None if its cluster does not know it."""
    try:
        return session.call(query.get_status)
    except Exception as error:
        if not _is_not_found(error):
            raise
        return None


def cancel_query(session: CloudSession, query: DirectQuery) -> None:
    """Cancel the query unless it has ended.

    Raises
    ------
    Exception
        The query could not be canceled.
    """
    is_canceled = False

    def cancel_unless_ended() -> None:
        nonlocal is_canceled
        try:
            if query.get_status().is_done():
                return
        except Exception as error:
            if _is_not_found(error):
                return
            if is_canceled:
                raise
        query.cancel()  # without an error if it fails on a direct connection
        is_canceled = True
        if not query.get_status().is_done():
            raise TimeoutError("it is still running")

    session.call(cancel_unless_ended)
    if is_canceled:
        logger.info("Canceled query %s", describe(query))


def _is_not_found(error: Exception) -> bool:
    return isinstance(error, not_found_error()) or NOT_FOUND in str(error)


def describe(query: DirectQuery) -> str:
    """Return the query's id and, last, the address of its page, if it has one."""
    return f"{get_query_id(query)} {get_page(query)}".rstrip()


def get_page(query: DirectQuery) -> str:
    """Return the address of the query's page; empty for a query on a cluster of your own."""
    ctx = get_context(query)
    if is_own_cluster(get_cluster_id(ctx) or ""):
        return ""
    portal = PORTAL or f"https://{frontend_domain()}"
    return f"{portal}/portal/{ctx.workspace.id}/{get_cluster_id(ctx)}/queries/{get_query_id(query)}"
