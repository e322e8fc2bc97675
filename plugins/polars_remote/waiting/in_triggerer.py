"""Poll queries and clusters from the triggerer, where many tasks wait in one process.

Each poll is a single call in a thread, so that the triggerer's event loop is never blocked. The
client has one login per process, so calls for different Connections wait for each other. Polls of
queries do not, because the connection to each cluster keeps its own login. Proxy mode has no such
connection, so its polls wait, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from airflow.configuration import conf

from ..cloud.client import connect_queries, get_cluster_status, uses_proxy
from ..cloud.queries import find_live_cluster
from ..cloud.retry import is_transient, start_thread, time_limit
from ..cloud.session import CloudSession, is_logged_out
from ..compat.internals import is_dag_test
from ..compat.versions import LISTS_VARIABLES, AirflowFailException
from ..errors import QueryLostError
from ..ownership import record
from ..ownership.end import end_orphans, end_task_entry, log_failures
from ..ownership.record import Owner
from ..settings import OUTAGE_SECONDS
from .progress import Progress, describe_progress, get_poll_interval

if TYPE_CHECKING:
    from polars_cloud import DirectQuery, QueryStatus

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CONCURRENT_CALLS = 8
"""Maximum concurrent calls per cluster."""

CALL_SECONDS = 20.0
"""Seconds after which a call without a reply is abandoned."""

FIRST_SWEEP_SECONDS, SWEEP_SECONDS = 5.0, 60.0
"""First delay and interval of the orphan sweep."""

KEEP_LOG_OPEN_SECONDS = 5.0
"""Maximum seconds for which a canceled trigger stays, so that Airflow keeps the task's log open."""

START_POLL_SECONDS = 3.0
"""Poll interval in seconds for a cluster that is starting."""


class WatchedCluster:
    """Connection to a cluster whose queries are polled, with the login of one account."""

    def __init__(self, conn_id: str, cluster_id: str) -> None:
        self._session = CloudSession(conn_id)
        self._cluster_id = cluster_id
        self._connecting = asyncio.Lock()
        self._calls = asyncio.Semaphore(MAX_CONCURRENT_CALLS)
        self._connect_query: Callable[[str], DirectQuery] | None = None
        self._uses_proxy = False

    async def call(self, query_id: str, function: Callable[[DirectQuery], T]) -> T:
        """Return the function's result for one of the cluster's queries.

        Raises
        ------
        QueryLostError
            The cluster has stopped.
        TimeoutError
            There was no reply.
        Exception
            Any error of the function.
        """
        async with self._calls:
            try:
                return await self._call(query_id, function)
            except Exception as error:
                if is_logged_out(error):  # logins expire
                    return await self._call(query_id, function)
                raise

    async def _call(self, query_id: str, function: Callable[[DirectQuery], T]) -> T:
        async with self._connecting:
            if self._connect_query is None:
                self._connect_query = await _in_thread(self._connect)
            connect = self._connect_query

        def call() -> T:
            if not self._uses_proxy:
                return function(connect(query_id))
            with time_limit(CALL_SECONDS - 1.0), self._session.logged_in():
                return function(connect(query_id))

        try:
            return await _in_thread(call)
        except Exception as error:
            has_new_one = self._connect_query is not connect
            if not has_new_one and (is_logged_out(error) or isinstance(error, TimeoutError)):
                self._connect_query = None
            raise

    def _connect(self) -> Callable[[str], DirectQuery]:
        with time_limit(CALL_SECONDS - 1.0), self._session.logged_in():
            ctx = find_live_cluster(self._session, self._cluster_id)
            if ctx is None:
                raise QueryLostError(f"cluster {self._cluster_id} has stopped")
            self._uses_proxy = uses_proxy(ctx)
            return self._session.call(connect_queries, ctx)


class Watch:
    """State shared by the triggers of one event loop.

    Attributes
    ----------
    watched
        Keys of the tasks that a trigger watches.
    """

    def __init__(self) -> None:
        self.watched: set[str] = set()
        self._clusters = WeakValueDictionary[tuple[str, str], WatchedCluster]()
        self._logged: set[tuple[str, Owner | None]] = set()
        # In a context of its own, to keep its lines out of the tasks' logs. The sweep continues
        # while no task is deferred: other tasks leave orphans, too.
        self._sweep = asyncio.get_running_loop().create_task(
            self._keep_sweeping(), context=Context()
        )

    def get_cluster(self, conn_id: str, cluster_id: str) -> WatchedCluster:
        """Return the connection to the cluster; all its triggers share one."""
        key = (conn_id, cluster_id)
        if (cluster := self._clusters.get(key)) is None:
            cluster = self._clusters[key] = WatchedCluster(conn_id, cluster_id)
        return cluster

    async def _keep_sweeping(self) -> None:
        # In `dag.test()`, a thread would read replies that are meant for the next task. No task is
        # killed there.
        if is_dag_test() or not LISTS_VARIABLES:
            return
        await asyncio.sleep(FIRST_SWEEP_SECONDS)
        while True:
            try:
                await asyncio.wrap_future(start_thread(self._sweep_orphans))
            except Exception as error:
                logger.warning("Orphan sweep failed, retrying in %.0f s: %s", SWEEP_SECONDS, error)
            await asyncio.sleep(SWEEP_SECONDS)

    def _sweep_orphans(self) -> None:
        left = end_orphans(excluding=self.watched)
        log_failures(each for each in left if (each.what, each.owner) not in self._logged)
        self._logged = {(each.what, each.owner) for each in left}


_watches = WeakKeyDictionary[asyncio.AbstractEventLoop, Watch]()


def _get_watch() -> Watch:
    loop = asyncio.get_running_loop()
    if (watch := _watches.get(loop)) is None:
        watch = _watches[loop] = Watch()
    return watch


@contextmanager
def watching_task(task_key: str) -> Iterator[None]:
    """Exclude a deferred task from the orphan sweep, which starts with the first such task.

    The sweep also covers tasks that a user ended before a triggerer ran their trigger: for those
    Airflow does not call `on_kill`.
    """
    watch = _get_watch()
    watch.watched.add(task_key)
    try:
        yield
    finally:
        watch.watched.discard(task_key)


async def watch_queries(
    conn_id: str, queries: list[dict[str, Any]]
) -> AsyncIterator[tuple[dict[str, Any], bool]]:
    """Poll the queries; yield an event with the results so far, and whether to resume the task.

    The event's `results` has a dict with `location` and `rows` for each query that has succeeded,
    by the query's name. The task is resumed when all queries have succeeded, when one has failed or
    was canceled, when a cluster has stopped, or when an outage exceeds `OUTAGE_SECONDS`.
    """
    watch = _get_watch()
    clusters = {
        each["cluster_id"]: watch.get_cluster(conn_id, each["cluster_id"]) for each in queries
    }
    since = min(each["submitted_at"] for each in queries)
    progress = Progress(since)
    outage = Outage()
    results: dict[str, Any] = {}
    while len(results) < len(queries):
        should_log = progress.should_log()
        left = [each for each in queries if each["destination"] not in results]
        polls = await asyncio.gather(
            *(_poll(clusters[each["cluster_id"]], each, should_log) for each in left),
            return_exceptions=True,
        )
        errors = [found for found in polls if isinstance(found, BaseException)]
        if not errors:
            outage.reset()
        for query, found in zip(left, polls, strict=True):
            if isinstance(found, dict):
                results[query["destination"]] = found
        should_resume = len(results) == len(queries) or any(
            [outage.exceeds_budget(each) for each in errors]
        )
        yield {"results": results}, should_resume
        await asyncio.sleep(get_poll_interval(time.time() - since))


async def _poll(
    cluster: WatchedCluster, query: dict[str, Any], should_log: bool
) -> dict[str, Any] | None:
    """Return the query's result, or None while it runs. Raises `QueryLostError` if it failed."""
    query_id = query["query_id"]
    status = await cluster.call(query_id, lambda each: each.get_status())
    if not status.is_done():
        if should_log:
            text = await cluster.call(query_id, _describe(status, query["submitted_at"]))
            logger.info("Query %s is %s %s", query_id, text, query["page"])
        return None
    if status.name != "SUCCESS":
        raise QueryLostError(f"query {query_id} is {status.name}")
    return await cluster.call(query_id, _get_result)


async def watch_cluster(
    conn_id: str, cluster_id: str
) -> AsyncIterator[tuple[dict[str, Any], bool]]:
    """Poll the cluster; yield an event, and whether to resume the task.

    If the cluster failed to start, the event's `failed` is the reason. Otherwise the event is
    empty.
    """
    session = CloudSession(conn_id)

    def poll() -> tuple[str, str]:
        with time_limit(CALL_SECONDS - 1.0), session.logged_in():
            return session.call(get_cluster_status, cluster_id, session.find_workspace())

    progress = Progress(time.time())
    outage = Outage()
    while True:
        try:
            status, reason = await _in_thread(poll)
        except Exception as error:
            yield {}, outage.exceeds_budget(error)
        else:
            outage.reset()
            has_failed = status not in {"STARTING", "IDLE", "RUNNING"}
            yield {"failed": reason or status} if has_failed else {}, status != "STARTING"
            if progress.should_log():
                logger.info("Cluster %s is %s", cluster_id, status)
        await asyncio.sleep(START_POLL_SECONDS)


class Outage:
    """Tracks how long Polars Cloud has been unreachable."""

    def __init__(self) -> None:
        self._since: float | None = None

    def exceeds_budget(self, error: BaseException) -> bool:
        """Return whether to resume the task after a poll's error.

        Errors of the login are raised: the trigger fails, and the task waits in its worker.
        """
        # For example, polars-cloud is not installed on the triggerer.
        if not isinstance(error, Exception) or isinstance(error, AirflowFailException):
            raise error
        if not is_transient(error) and not is_logged_out(error):
            logger.info("Resuming the task: %s", error)
            return True
        if self._since is None:
            self._since = time.monotonic()
            logger.warning("Polars Cloud is unavailable, retrying: %s", error)
        if time.monotonic() - self._since < OUTAGE_SECONDS:
            return False
        logger.warning("Polars Cloud is still unavailable, resuming the task: %s", error)
        return True

    def reset(self) -> None:
        """Record that Polars Cloud has answered."""
        self._since = None


async def cancel_queries(conn_id: str, queries: list[dict[str, Any]]) -> None:
    """Cancel the queries of a task that has exceeded its `execution_timeout`."""
    for each in queries:
        cluster = _get_watch().get_cluster(conn_id, each["cluster_id"])
        try:
            await cluster.call(each["query_id"], lambda query: query.cancel())
        except Exception as error:
            logger.warning(
                "Could not cancel query %s here; its task will, when it resumes: %s",
                each["query_id"],
                error,
            )
        else:
            logger.info("Canceled query %s: the task timed out", each["query_id"])


async def end_task(task_key: str) -> None:
    """End the queries and cluster uses of a task unless it is deferred.

    If a frozen triggerer wakes up after another one has taken over its triggers, Airflow calls
    `on_kill` although the tasks are still deferred.
    """

    def end() -> None:
        task = record.get_task(task_key)
        if task and not task.owner.is_deferred():
            _end_task(task_key)

    await asyncio.wrap_future(start_thread(end))


async def end_if_ended(task_key: str) -> None:
    """End the queries and cluster uses of a task if the task has ended, according to Airflow.

    Its trigger was canceled, for one of these reasons: a user has ended the task, its deferral has
    timed out, another triggerer has taken over the trigger, or this triggerer is stopping. In the
    last case, Airflow does not answer. The work is done in a thread, because Airflow cancels the
    trigger again every second. The trigger waits for the thread for a few seconds, because Airflow
    closes the task's log when the trigger ends.
    """

    def end() -> None:
        try:
            task = record.get_task(task_key)
            if task and not task.owner.is_active():
                _end_task(task_key)
        except Exception as error:
            logger.warning(
                "The task's trigger was canceled, and Airflow did not report the task's state. The "
                "task's queries keep running (%s)",
                error,
            )

    logger.info(
        "Airflow canceled the trigger. If the task has ended, its queries are canceled and its "
        "clusters are stopped unless others use them"
    )
    ending = asyncio.wrap_future(start_thread(end))
    ends = time.monotonic() + KEEP_LOG_OPEN_SECONDS
    while not ending.done() and (left := ends - time.monotonic()) > 0:
        with suppress(asyncio.CancelledError):
            await asyncio.wait([ending], timeout=left)


def _end_task(task_key: str) -> None:
    # Airflow stops waiting after `on_kill_timeout`.
    seconds = conf.getfloat("triggerer", "on_kill_timeout", fallback=30.0)
    with time_limit(seconds - 1.0):
        log_failures(end_task_entry(task_key))


async def _in_thread(function: Callable[[], T]) -> T:
    async with asyncio.timeout(CALL_SECONDS):
        return await asyncio.wrap_future(start_thread(function))


def _get_result(query: DirectQuery) -> dict[str, Any]:
    result = query.await_result()
    return {"location": result.location, "rows": result.n_rows_total}


def _describe(status: QueryStatus, submitted_at: float) -> Callable[[DirectQuery], str]:
    return lambda query: describe_progress(query, status, time.time() - submitted_at)
