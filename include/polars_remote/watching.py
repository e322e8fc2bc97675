"""Look at queries and clusters from the triggerer, where many tasks wait in one process.

Each look is a single call in a thread, so that the triggerer's event loop is never blocked. The
client's login is process-wide: a cluster's queries are looked at with a login of their own, and the
rest takes turns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from airflow.configuration import conf

from . import ledger
from .accounts import acting_as
from .airflow_versions import AirflowFailException
from .client_internals import connect_queries, look_at_cluster
from .leftovers import end_task_entry
from .login import is_logged_out
from .outages import is_transient, start_thread, time_limit
from .progress import Progress, describe_progress, get_pause
from .recorded_queries import find_live_cluster
from .settings import OUTAGE_SECONDS, WORKSPACE

if TYPE_CHECKING:
    from polars_cloud import DirectQuery, QueryStatus

logger = logging.getLogger(__name__)

T = TypeVar("T")

CALLS_AT_ONCE = 8
"""To one cluster: one that does not answer occupies no more threads than this."""

CALL_SECONDS = 20.0
"""After which a call without a reply is given up."""

FIRST_SWEEP_SECONDS, SWEEP_SECONDS = 5.0, 60.0
"""Until what ended tasks have left is looked for, and between two such looks."""

CLUSTER_PAUSE_SECONDS = 3.0
"""Between two looks at a cluster that is starting."""


class QueryLost(Exception):
    """There is nothing left to look at: the task has to see for itself."""


class WatchedCluster:
    """A cluster whose queries are looked at, with the login of one account."""

    def __init__(self, conn_id: str, cluster_id: str) -> None:
        self._conn_id = conn_id
        self._cluster_id = cluster_id
        self._connecting = asyncio.Lock()
        self._calls = asyncio.Semaphore(CALLS_AT_ONCE)
        self._connect_query: Callable[[str], DirectQuery] | None = None

    async def call(self, query_id: str, function: Callable[[DirectQuery], T]) -> T:
        """Call the function with a query of the cluster's.

        Raises
        ------
        QueryLost
            The cluster has stopped.
        Exception
            As the function raised it; `TimeoutError` if there was no reply.
        """
        async with self._calls:
            try:
                return await self._call(query_id, function)
            except Exception as error:
                if is_logged_out(error):  # as a login is after a while
                    return await self._call(query_id, function)
                raise

    async def _call(self, query_id: str, function: Callable[[DirectQuery], T]) -> T:
        async with self._connecting:
            if self._connect_query is None:
                self._connect_query = await _in_thread(self._connect)
            connect = self._connect_query
        try:
            return await _in_thread(lambda: function(connect(query_id)))
        except Exception as error:
            has_new_one = self._connect_query is not connect
            if not has_new_one and (is_logged_out(error) or isinstance(error, TimeoutError)):
                self._connect_query = None
            raise

    def _connect(self) -> Callable[[str], DirectQuery]:
        with time_limit(CALL_SECONDS - 1.0), acting_as(self._conn_id):
            ctx = find_live_cluster(self._cluster_id)
            if ctx is None:
                raise QueryLost(f"cluster {self._cluster_id} has stopped")
            return connect_queries(ctx)


_clusters = WeakKeyDictionary[
    asyncio.AbstractEventLoop, WeakValueDictionary[tuple[str, str], WatchedCluster]
]()


def _share(conn_id: str, cluster_id: str) -> WatchedCluster:
    """The one that watches this cluster already, for as long as anybody does."""
    clusters = _clusters.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
    key = (conn_id, cluster_id)
    if (cluster := clusters.get(key)) is None:
        cluster = clusters[key] = WatchedCluster(conn_id, cluster_id)
    return cluster


_looked_after: set[str] = set()
_sweeping: asyncio.Task[None] | None = None


@contextmanager
def looking_after(task_key: str) -> Iterator[None]:
    """Look after a deferred task, and after what others have left that nobody looks after.

    Airflow tells a trigger that its task has ended, unless that was before a triggerer ran it.
    """
    global _sweeping
    if not _looked_after:
        _sweeping = asyncio.create_task(_sweep())
    _looked_after.add(task_key)
    try:
        yield
    finally:
        _looked_after.discard(task_key)
        if not _looked_after and _sweeping:
            _sweeping.cancel()


async def _sweep() -> None:
    await asyncio.sleep(FIRST_SWEEP_SECONDS)
    while True:
        try:
            await asyncio.wrap_future(start_thread(_end_deserted_tasks))
        except Exception as error:
            logger.warning("What ended tasks have left is looked for again later: %s", error)
        await asyncio.sleep(SWEEP_SECONDS)


def _end_deserted_tasks() -> None:
    for key in ledger.keys(ledger.TASKS):
        if key not in _looked_after and (entry := ledger.get(key)):
            owner, value = entry
            if value["waits_for"] and not owner.goes_on():
                logger.info("Task %s has ended while no triggerer was there", owner.task_id)
                with acting_as(value["conn_id"]):
                    end_task_entry(key)


async def watch_queries(
    conn_id: str, queries: list[dict[str, Any]]
) -> AsyncIterator[tuple[dict[str, Any], bool]]:
    """Yield the results of the queries so far, and whether the wait is over.

    It is when all have succeeded, and when a wait for the others is in vain here: one has failed or
    was canceled, an outage lasts too long, a cluster has stopped.
    """
    clusters = {each["cluster_id"]: _share(conn_id, each["cluster_id"]) for each in queries}
    since = min(each["submitted_at"] for each in queries)
    progress = Progress(since)
    outage = Outage()
    results: dict[str, Any] = {}
    while len(results) < len(queries):
        tells = progress.is_due()
        left = [each for each in queries if each["destination"] not in results]
        looks = await asyncio.gather(
            *(_look(clusters[each["cluster_id"]], each, tells) for each in left),
            return_exceptions=True,
        )
        errors = [found for found in looks if isinstance(found, BaseException)]
        if not errors:
            outage.is_over()
        for query, found in zip(left, looks, strict=True):
            if isinstance(found, dict):
                results[query["destination"]] = found
        is_over = len(results) == len(queries) or any([outage.outlasts(each) for each in errors])
        yield {"results": results}, is_over
        await asyncio.sleep(get_pause(time.time() - since))


async def _look(
    cluster: WatchedCluster, query: dict[str, Any], tells: bool
) -> dict[str, Any] | None:
    """Return a query's result, or None while it has none; raises `QueryLost` if it will not."""
    query_id = query["query_id"]
    status = await cluster.call(query_id, lambda each: each.get_status())
    if not status.is_done():
        if tells:
            text = await cluster.call(query_id, _describe(status, query["submitted_at"]))
            logger.info("Query %s (%s): %s", query_id, query["page"], text)
        return None
    if status.name != "SUCCESS":
        raise QueryLost(f"query {query_id} is {status.name}")
    return await cluster.call(query_id, _get_result)


async def watch_cluster(
    conn_id: str, cluster_id: str
) -> AsyncIterator[tuple[dict[str, Any], bool]]:
    """Yield whether the wait for the cluster is over, and why it did not start if it did not."""

    def look() -> tuple[str, str]:
        with time_limit(CALL_SECONDS - 1.0), acting_as(conn_id):
            return look_at_cluster(cluster_id, WORKSPACE)

    progress = Progress(time.time())
    outage = Outage()
    while True:
        try:
            status, reason = await _in_thread(look)
        except Exception as error:
            yield {}, outage.outlasts(error)
        else:
            outage.is_over()
            has_failed = status not in {"STARTING", "IDLE", "RUNNING"}
            yield {"failed": reason or status} if has_failed else {}, status != "STARTING"
            if progress.is_due():
                logger.info("Cluster %s is %s", cluster_id, status)
        await asyncio.sleep(CLUSTER_PAUSE_SECONDS)


class Outage:
    """Polars Cloud is out of reach since some time."""

    def __init__(self) -> None:
        self._since: float | None = None

    def outlasts(self, error: BaseException) -> bool:
        """Whether the task has to see for itself, now that a look has failed with this error."""
        # Without a login, as where the client is missing, nothing can be looked at from here: the
        # trigger fails, and its task waits in its worker, which may be better off.
        if not isinstance(error, Exception) or isinstance(error, AirflowFailException):
            raise error
        if not is_transient(error) and not is_logged_out(error):
            logger.info("The task is resumed: %s", error)
            return True
        if self._since is None:
            self._since = time.monotonic()
            logger.warning("Polars Cloud is unavailable, looking again for a while: %s", error)
        if time.monotonic() - self._since < OUTAGE_SECONDS:
            return False
        logger.warning("Polars Cloud is still unavailable, the task is resumed: %s", error)
        return True

    def is_over(self) -> None:
        self._since = None


async def cancel_queries(conn_id: str, queries: list[dict[str, Any]]) -> None:
    """Cancel the queries of a task that is out of time."""
    for each in queries:
        cluster = _share(conn_id, each["cluster_id"])
        try:
            await cluster.call(each["query_id"], lambda query: query.cancel())
        except Exception as error:
            logger.warning("Query %s is left to the task to cancel: %s", each["query_id"], error)
        else:
            logger.info("Canceled query %s: the task is out of time", each["query_id"])


async def end_task(conn_id: str, task_key: str) -> None:
    """End all that a deferred task has started."""

    def end() -> None:
        # Airflow gives up waiting for it then.
        seconds = conf.getfloat("triggerer", "on_kill_timeout", fallback=30.0)
        with time_limit(seconds - 1.0), acting_as(conn_id):
            end_task_entry(task_key)

    await asyncio.wrap_future(start_thread(end))


async def _in_thread(function: Callable[[], T]) -> T:
    async with asyncio.timeout(CALL_SECONDS):
        return await asyncio.wrap_future(start_thread(function))


def _get_result(query: DirectQuery) -> dict[str, Any]:
    result = query.await_result()
    if not result.location:
        raise QueryLost("its result has no location")
    return {"location": result.location, "rows": result.n_rows_total}


def _describe(status: QueryStatus, submitted_at: float) -> Callable[[DirectQuery], str]:
    return lambda query: describe_progress(query, status, time.time() - submitted_at)
