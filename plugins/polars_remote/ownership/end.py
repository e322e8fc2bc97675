"""End the queries and cluster uses of tasks: cancel queries, and stop clusters after the last use.

An entry of the record is an orphan if its owner has ended, according to Airflow. An orphan is ended
by the first of these that finds it: the next try, a teardown, a trigger, a DAG's callback, the next
user of the same cluster, the orphan sweep, or the DAG `end_orphans`. Failures are logged; they
never change a task's result.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from airflow.configuration import conf
from airflow.sdk import Context

from ..cloud.client import get_cluster_id, misspecified_error
from ..cloud.manifests import find_manifest
from ..cloud.queries import cancel_query, find_query
from ..cloud.retry import time_left, time_limit
from ..cloud.session import CloudSession
from ..compat.internals import has_supervisor
from ..compat.versions import LISTS_VARIABLES
from . import record
from .costs import Cost, describe_unknown, log_costs
from .record import ClusterUse, Owner, QueryRecord, TaskRecord

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, DirectQuery

logger = logging.getLogger(__name__)

IDLE_WAIT_SECONDS = 10.0
"""Maximum seconds to wait for a cluster to become idle before it is stopped."""

PARSE_SECONDS = 10.0
"""Seconds reserved in the DAG processor for parsing the file and for final log lines."""

MAX_CONCURRENT_CANCELS = 8
"""Maximum concurrent cancellations of a task."""

Uncharged = dict[str, tuple[list[ClusterUse], list[ClusterUse]]]
"""Uses whose cost is to be logged, and all other uses, by `Owner.run`; this use's run first."""
FindQuery = Callable[[CloudSession, str, QueryRecord], "DirectQuery | None"]


class EndedUse(NamedTuple):
    """Failures to end a use, and the cost of each cluster if the run's use of it has ended."""

    left: list[EndFailure]
    costs: list[Cost]


class EndFailure(NamedTuple):
    """A query, use or entry that could not be ended; its owner, if known; and the reason."""

    what: str
    owner: Owner | None
    reason: str

    def __str__(self) -> str:
        of_owner = f" of {self.owner}" if self.owner else ""
        reason = " ".join(self.reason.split()).rstrip(".")
        return f"Could not end {self.what}{of_owner}: {reason}"


def clean_up(context: Context | None = None) -> None:
    """Cancel orphaned queries and stop orphaned clusters of a run that has ended.

    Use `clean_up` as `on_failure_callback` and as `on_success_callback` of a DAG. Orphans remain
    after a worker was killed in a task's last try, and after a run has exceeded its
    `dagrun_timeout`, which skips its teardown. Tasks that were cleared in the meantime are active:
    their queries keep running.

    Airflow calls `clean_up` once, in the DAG processor, and kills the call after
    `dag_file_processor_timeout`. All callbacks in a list share this time, so put `clean_up` first.

    Parameters
    ----------
    context
        Airflow's context: orphans of its run are ended. Without it, orphans of all runs are ended,
        as in the DAG `end_orphans`; this needs Airflow 3.3.
    """
    if not has_supervisor():
        return  # `dag.test()` kills no task, and attaches no supervisor to callbacks
    if context is None:
        if not LISTS_VARIABLES:
            logger.warning(
                "No orphan was ended, because orphans of all runs can be found only with Airflow "
                "3.3 or newer: set clean_up as callback of each DAG"
            )
        left = end_orphans()
    else:
        seconds = conf.getfloat("dag_processor", "dag_file_processor_timeout") - PARSE_SECONDS
        with time_limit(max(seconds, PARSE_SECONDS)):
            left = end_orphans(record.digest(context["dag"].dag_id, context["run_id"]))
    log_failures(left)


def end_orphans(run: str = "", *, excluding: Collection[str] = ()) -> list[EndFailure]:
    """End all orphans, and return the failures.

    Parameters
    ----------
    run
        `Owner.run`; all runs if empty.
    excluding
        Keys of watched tasks. Their cluster uses are excluded, too: they are needed to stop the
        cluster when the queries have ended.
    """
    left: list[EndFailure] = []
    watched = {record.get_owner_part(key) for key in excluding}
    done: set[str] = set()
    # Queries first: only a cluster without running queries can be stopped.
    for prefix, of_run, get in (
        (f"{record.TASKS}{run}/" if run else record.TASKS, "", record.get_task),
        (record.CLUSTERS, run, record.get_use),
    ):
        for key in record.find_keys(prefix, of_run):
            if record.is_ended(key):
                continue  # the last user of the cluster erases the entry
            if key not in done and record.get_owner_part(key) not in watched:
                left += _end_orphan(key, get, run, done)
    return left


def _end_orphan(
    key: str,
    get: Callable[[str], TaskRecord | ClusterUse | None],
    run: str,
    done: set[str],
) -> list[EndFailure]:
    """End an entry if its owner has ended. Adds uses that could not be ended to `done`."""
    try:
        entry = get(key)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [EndFailure(f"entry {key}", None, f"it cannot be read ({error!r})")]
    if entry is None:
        return []
    try:
        # Ask for the state after reading the entry: an owner that has ended writes no more.
        if entry.owner.is_active():
            if run:
                logger.info("%s is active: its queries and clusters keep running", entry.owner)
            return []
    except Exception as error:
        return [EndFailure("the entry", entry.owner, str(error))]
    logger.info("Ending orphans of %s", entry.owner)
    session = CloudSession(entry.conn_id)
    if isinstance(entry, ClusterUse):
        return end_use(session, entry).left
    left = end_task(session, key, entry)
    done.update(entry.cluster_uses)  # those that could not be ended
    return left


def end_task_entry(key: str) -> list[EndFailure]:
    """End the queries and cluster uses of a deferred task, unless a later try has adopted them."""
    task = record.get_task(key)
    if task is None:
        return []
    if max(record.find_keys(record.task_key(task.owner)), default=key) > key:
        logger.info("A later try of %s has adopted its queries: they keep running", task.owner)
        return []
    return end_task(CloudSession(task.conn_id), key, task)


def end_task(
    session: CloudSession,
    key: str,
    task: TaskRecord,
    *,
    ended: Collection[str] = (),
    skip: Collection[str] = (),
    find: FindQuery | None = None,
) -> list[EndFailure]:
    """Cancel a task's queries, end its cluster uses, and erase its entry; never raises.

    Queries and uses that could not be ended stay in the record. Returns the failures.

    Parameters
    ----------
    ended
        Names of queries that have ended.
    skip
        Names of queries and keys of uses that are not tried again, because they have just failed.
    find
        Function that connects to a query; by default `find_recorded`.
    """
    queries = {name: each for name, each in task.queries.items() if name not in ended}
    to_end = {name: each for name, each in queries.items() if name not in skip}
    failed_queries = cancel_recorded_queries(session, task.owner, to_end, find)
    left = [*failed_queries.values()]
    running = {name: each for name, each in queries.items() if name not in to_end}
    running |= {name: queries[name] for name in failed_queries}
    busy = {each.manifest for each in running.values()}
    uses = []
    for use_key in sorted(task.cluster_uses):
        if use_key in skip:
            uses.append(use_key)
            continue
        try:
            use = record.get_use(use_key)
        except Exception as error:
            left.append(EndFailure("the use of a cluster", task.owner, str(error)))
            uses.append(use_key)
            continue
        if use and use.manifest in busy:
            uses.append(use_key)
        elif use and (failed := end_use(session, use).left):
            left += failed
            uses.append(use_key)
    try:
        task.queries = running
        if task.queries or uses or left:
            task.cluster_uses, task.is_stale = uses, True
            record.put(key, task)
        else:
            record.erase(key)
    except Exception as error:
        left.append(EndFailure("the entry", task.owner, str(error)))
    return left


def cancel_recorded_queries(
    session: CloudSession,
    owner: Owner,
    queries: Mapping[str, QueryRecord],
    find: FindQuery | None = None,
) -> dict[str, EndFailure]:
    """Cancel recorded queries concurrently. Return the failures by name; never raises."""
    if not queries:
        return {}

    def end(name: str, query: QueryRecord) -> EndFailure | None:
        try:
            if found := (find or find_recorded)(session, name, query):
                cancel_query(session, found)
        except Exception as error:
            what = f"query {query.query_id or '(id unknown)'} for {name}"
            return EndFailure(f"{what} on cluster {query.cluster_id}", owner, str(error))
        return None

    with ThreadPoolExecutor(min(len(queries), MAX_CONCURRENT_CANCELS)) as threads:
        ends = {
            name: threads.submit(copy_context().run, end, name, each)
            for name, each in queries.items()
        }
    return {name: left for name, each in ends.items() if (left := each.result())}


def find_recorded(session: CloudSession, name: str, query: QueryRecord) -> DirectQuery | None:
    """Return a recorded query, or None if its cluster has stopped or has no such query."""
    # Older releases recorded no destination: the query's name was its destination.
    destination = query.destination or (name if "://" in name else "")
    return find_query(session, query.cluster_id, query.query_id, destination, query.known)


def end_use(
    session: CloudSession,
    use: ClusterUse,
    ctx: ComputeContext | None = None,
    *,
    waits_for_stop: bool = False,
) -> EndedUse:
    """End a use of a cluster. The last user stops the cluster. Never raises.

    Two users may end at the same time. Each erases its use, and then checks again for other users.
    The later one finds none and stops the cluster. If the stop fails, the use is recorded again.
    Orphaned uses are erased after the stop.

    Parameters
    ----------
    ctx
        Context of the cluster, if its id is known.
    waits_for_stop
        Whether to wait a few seconds until the cluster has stopped and its total cost is known.
    """
    others = _Others(session, use)
    ended: ClusterUse | None = None
    is_erased = False
    try:
        is_last = not others.are_active() and others.stop_unless_used(ctx)
        if not is_last:
            ended = others.record_ended_use()
        record.erase(use.key)
        is_erased = True
        if not is_last and (others.are_active() or not others.stop_unless_used(ctx)):
            logger.info("Cluster of manifest %s keeps running for its other users", use.manifest)
        uncharged = others.find_uncharged(ended)
        others.erase_ended()
    except Exception as error:
        left = [
            EndFailure(f"the use of the cluster of manifest {use.manifest}", use.owner, str(error))
        ]
        if is_erased:
            try:
                record.put(use.key, use)
                if ended:
                    record.erase(ended.key)
            except Exception as error:
                left.append(EndFailure("the entry", use.owner, str(error)))
        return EndedUse(left, [])
    return EndedUse([], others.log_costs(uncharged, waits_for_stop=waits_for_stop))


def has_other_users(session: CloudSession, use: ClusterUse) -> bool:
    """Return whether another active task uses the cluster. Cancels orphans on the cluster."""
    return _Others(session, use).are_active()


class _Others:
    """The other users of a cluster."""

    def __init__(self, session: CloudSession, use: ClusterUse) -> None:
        self._session = session
        self._use = use
        self.should_stop = use.stops
        """Whether the last user stops the cluster: this use or an orphaned one asks for it."""
        self._keys: list[str] = []
        """Keys of all other uses, including those that have ended."""
        self._active: ClusterUse | None = None
        """Use of another active user, if one was found."""
        self._orphans: dict[str, ClusterUse] = {}
        """Orphaned uses by key; their queries have been canceled."""

    def are_active(self) -> bool:
        """Return whether another user is active. Cancels the queries of users that have ended."""
        self._active = None
        keys = record.find_keys(record.cluster_prefix(self._use.manifest))
        self._keys = [key for key in keys if key != self._use.key]
        for key in self._keys:
            if record.is_ended(key) or not (other := record.get_use(key)):
                continue
            if other.owner.is_active():
                self._active = other
                return True
            # Uses of other Connections are left to the sweep: a process has one login at a time.
            if other.conn_id == self._session.conn_id and self._end_tasks(other):
                self.should_stop |= other.stops
                self._orphans[key] = other
        return False

    def record_ended_use(self) -> ClusterUse | None:
        """Record when this use ended, if other users need the time for their shares of the cost."""
        if not (self._use.clusters and self._active):
            return None
        of_this_run, of_others = self._get_users()
        known = self._active.clusters
        if not of_others and all(
            known.get(cluster_id, math.inf) <= since
            for cluster_id, since in self._use.clusters.items()
        ):
            return None
        ended = replace(self._use, until=time.time(), is_charged=not of_this_run)
        record.put(ended.key, ended)
        return ended

    def find_uncharged(self, ended: ClusterUse | None) -> Uncharged | str:
        """Return the uses whose cost is to be logged, or the reason if no cost can be logged.

        Parameters
        ----------
        ended
            This use, if it was recorded as ended.
        """
        of_this_run, _ = self._get_users()
        if of_this_run:
            return "other tasks of this run use the cluster"
        try:
            return self._get_uncharged(ended)
        except Exception as error:
            logger.warning(
                "The cost of manifest %s is unknown, because the record could not be read: %s",
                self._use.manifest,
                error,
            )
            return str(error)

    def log_costs(self, uncharged: Uncharged | str, *, waits_for_stop: bool) -> list[Cost]:
        """Log the cost of each run, and return the cost of this use's run."""
        if isinstance(uncharged, str):
            return [describe_unknown(self._use, each, uncharged) for each in self._use.clusters]
        costs = {
            run: log_costs(
                self._session,
                uses,
                others,
                is_last=not self._active and not index,
                waits_for_stop=waits_for_stop,
            )
            for index, (run, (uses, others)) in enumerate(uncharged.items())
        }
        return costs[self._use.owner.run]

    def _get_uncharged(self, ended: ClusterUse | None) -> Uncharged:
        """Return the uncharged uses of each ended run, this run first, and all other uses."""
        stored = {
            key: use
            for key in self._keys
            if not (ended and key == ended.key)
            and (use := self._orphans.get(key) or record.get_use(key))
        }
        every = [self._use, *stored.values()]
        runs = [self._use.owner.run]
        if not self._active:
            runs = [*dict.fromkeys(runs + [each.owner.run for each in self._orphans.values()])]
        found = {}
        for run in runs:
            of_run = [each for each in every if each.owner.run == run]
            charged = max((each.until or 0.0 for each in of_run if each.is_charged), default=0.0)
            uses = [each for each in of_run if each.until is None or each.until > charged]
            found[run] = uses, [each for each in every if each not in uses]
        return found

    def _get_users(self) -> tuple[list[str], list[str]]:
        """Return the keys of other users that have not ended, in this run and in other runs."""
        users = [key for key in self._keys if not record.is_ended(key) and key not in self._orphans]
        run = self._use.owner.run
        of_this_run = [key for key in users if record.get_run_part(key) == run]
        return of_this_run, [key for key in users if key not in of_this_run]

    def erase_ended(self) -> None:
        """Erase ended and orphaned uses, after the last user of the cluster.

        While other users are active, erase only this run's orphans, after the last user of the run.
        Ended uses then stay in the record, for the others' shares of the cost.
        """
        run = self._use.owner.run
        of_this_run, _ = self._get_users()
        for key in self._keys:
            is_of_ended_run = not of_this_run and record.get_run_part(key) == run
            if (key in self._orphans and (not self._active or is_of_ended_run)) or (
                not self._active and record.is_ended(key)
            ):
                record.erase(key)

    def stop_unless_used(self, ctx: ComputeContext | None) -> bool:
        """Stop the cluster if `should_stop`. Return False if another user has started to use it."""
        return not self.should_stop or _stop(self._session, self._use, ctx)

    def _end_tasks(self, use: ClusterUse) -> bool:
        """Cancel the queries of the tasks behind an orphaned use. Return whether all succeeded."""
        owner = use.owner
        prefix = f"{record.TASKS}{owner.run}/" if owner.whole_run else record.task_key(owner)
        all_ended = True
        for key in record.find_keys(prefix):
            task = record.get_task(key)
            if task is None or task.owner.is_active():
                continue
            logger.info("Ending orphans of %s", task.owner)
            left = cancel_recorded_queries(self._session, task.owner, task.queries)
            log_failures(left.values())
            all_ended &= not left
            task.queries = {name: task.queries[name] for name in left}
            task.cluster_uses = [each for each in task.cluster_uses if each != use.key]
            if task.queries or task.cluster_uses:
                record.put(key, task)
            else:
                record.erase(key)
        return all_ended


def _stop(session: CloudSession, use: ClusterUse, ctx: ComputeContext | None) -> bool:
    """Stop the cluster unless a query runs on it. Return False if another user came."""
    manifest = use.manifest
    status = session.call(ctx.get_status) if ctx else None
    # After a stop, another user may have started a new cluster of the manifest.
    if status is None or not status.is_available():
        try:
            ctx = find_manifest(session, manifest)
        except misspecified_error() as error:
            logger.info("Manifest %s was registered again, nothing to stop: %s", manifest, error)
            return True
        status = session.call(ctx.get_status) if ctx else None
    if ctx is None or status is None:
        logger.info("Manifest %s does not exist: nothing to stop", manifest)
        return True
    deadline = time.monotonic() + time_left(IDLE_WAIT_SECONDS)
    while status.name == "RUNNING":
        if time.monotonic() > deadline:
            logger.info(
                "Cluster %s keeps running: it runs a query of another user", get_cluster_id(ctx)
            )
            return True
        time.sleep(0.2)
        status = session.call(ctx.get_status)
    if not status.is_available():
        logger.info("Cluster of manifest %s is not running: nothing to stop", manifest)
        return True
    # Check again: another user may have started while the cluster became idle.
    if has_other_users(session, use):
        return False
    session.call(ctx.stop)
    logger.info("Cluster %s stopped", get_cluster_id(ctx))
    return True


def log_failures(left: Iterable[EndFailure]) -> None:
    """Log a warning for each failure."""
    for each in left:
        logger.warning("%s. The next try, clean_up or the orphan sweep will try again", each)
