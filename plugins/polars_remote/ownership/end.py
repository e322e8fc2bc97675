"""End the queries and cluster uses of tasks.

An entry on record is an orphan when its owner has ended, according to Airflow. Whoever sees an
orphan first ends it: the next try, a teardown, a trigger, a DAG's callback, the next user of the
same cluster, or the sweep. A task's result never depends on this.
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
"""Maximum seconds to wait for the cluster to become idle."""

PARSE_SECONDS = 10.0
"""Seconds reserved in the DAG processor for parsing the file and for final log lines."""

MAX_CONCURRENT_CANCELS = 8
"""Maximum concurrent cancellations of a task."""

Uncharged = dict[str, tuple[list[ClusterUse], list[ClusterUse]]]
"""Uses of a run whose cost is due, and the other users, by `Owner.run`; this use's run first."""
FindQuery = Callable[[CloudSession, str, QueryRecord], "DirectQuery | None"]


class EndedUse(NamedTuple):
    """What could not be ended, and what the run's use of each cluster cost, if it has ended."""

    left: list[EndFailure]
    costs: list[Cost]


class EndFailure(NamedTuple):
    """A query, use or entry that could not be ended, its owner if known, and why."""

    what: str
    owner: Owner | None
    reason: str

    def __str__(self) -> str:
        of_owner = f" of {self.owner}" if self.owner else ""
        reason = " ".join(self.reason.split()).rstrip(".")
        return f"Could not end {self.what}{of_owner}: {reason}"


def clean_up(context: Context | None = None) -> None:
    """End orphans: use it as `on_failure_callback` and `on_success_callback` of a DAG.

    A run that exceeds its `dagrun_timeout` skips its teardown, and a worker that is killed at a
    task's last try leaves an orphan. Tasks that were cleared since are active, and keep their
    queries.

    Airflow calls it once, in the DAG processor, and kills the call after
    `dag_file_processor_timeout`. A list of callbacks shares this time, so put `clean_up` first.

    Parameters
    ----------
    context
        Airflow's context, to end orphans of its run. Without it, orphans of all runs are ended, as
        in the DAG `end_orphans`; this needs Airflow 3.3.
    """
    if not has_supervisor():
        return  # `dag.test()` kills no task, and has no supervisor to ask
    if context is None:
        if not LISTS_VARIABLES:
            logger.warning("No orphan is ended: only Airflow 3.3 and newer can list Variables")
        left = end_orphans()
    else:
        seconds = conf.getfloat("dag_processor", "dag_file_processor_timeout") - PARSE_SECONDS
        with time_limit(max(seconds, PARSE_SECONDS)):
            left = end_orphans(record.digest(context["dag"].dag_id, context["run_id"]))
    log_failures(left)


def end_orphans(run: str = "", *, excluding: Collection[str] = ()) -> list[EndFailure]:
    """End all orphans, and return those that could not be ended.

    Parameters
    ----------
    run
        `Owner.run`; all runs if empty.
    excluding
        Keys of watched tasks. Their cluster uses are left alone, too: without them, nobody would
        stop the cluster when the queries have ended.
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
                continue  # the last user of the cluster erases it
            if key not in done and record.get_owner_part(key) not in watched:
                left += _end_orphan(key, get, run, done)
    return left


def _end_orphan(
    key: str,
    get: Callable[[str], TaskRecord | ClusterUse | None],
    run: str,
    done: set[str],
) -> list[EndFailure]:
    """End the entry if its owner has ended; add a task's remaining cluster uses to `done`."""
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
                logger.info("%s is active: nothing of it is ended", entry.owner)
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
    """End the queries and cluster uses of a deferred task, unless a later try owns them."""
    task = record.get_task(key)
    if task is None:
        return []
    if max(record.find_keys(record.task_key(task.owner)), default=key) > key:
        logger.info("A later try of %s owns its queries: they are left alone", task.owner)
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

    Queries and uses that could not be ended stay on record, and are returned.

    Parameters
    ----------
    ended
        Names of queries that have ended.
    skip
        Names of queries and keys of uses that could not be ended a moment ago.
    find
        Function that connects to a query; by default, by the ids on record.
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
    """Cancel the queries concurrently, and return the failures by name; never raises."""
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
    """Connect to a query on record, or return None if its cluster is gone or does not know it."""
    # Older releases wrote no destination: the name was the destination.
    destination = query.destination or (name if "://" in name else "")
    return find_query(session, query.cluster_id, query.query_id, destination, query.known)


def end_use(
    session: CloudSession,
    use: ClusterUse,
    ctx: ComputeContext | None = None,
    *,
    waits_for_stop: bool = False,
) -> EndedUse:
    """End a use of a cluster; the last user stops it. Never raises.

    Two users may end at the same time. Each erases its use, then checks again for other users; the
    later one finds none and stops the cluster. If the stop fails, the use is recorded again.
    Orphaned uses are erased after the stop.

    Parameters
    ----------
    ctx
        Context of the cluster, if its id is known.
    waits_for_stop
        Whether to wait some seconds until the cluster has stopped, for the whole of its cost.
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
            logger.info("Cluster of manifest %s runs on for its other users", use.manifest)
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
    """Return whether another active task uses the cluster; cancel orphans on the cluster."""
    return _Others(session, use).are_active()


class _Others:
    """The other users of a cluster."""

    def __init__(self, session: CloudSession, use: ClusterUse) -> None:
        self._session = session
        self._use = use
        self.should_stop = use.stops
        """Whether this user, or one of the users that have ended, is to stop the cluster."""
        self._keys: list[str] = []
        """Keys of all uses but this one, those that have ended included."""
        self._active: ClusterUse | None = None
        """An active user that was seen."""
        self._orphans: dict[str, ClusterUse] = {}
        """Uses whose owners were killed, by key; their queries are canceled."""

    def are_active(self) -> bool:
        """Return whether another user is active; cancel the queries of users that have ended."""
        self._active = None
        keys = record.find_keys(record.cluster_prefix(self._use.manifest))
        self._keys = [key for key in keys if key != self._use.key]
        for key in self._keys:
            if record.is_ended(key) or not (other := record.get_use(key)):
                continue
            if other.owner.is_active():
                self._active = other
                return True
            # The sweep ends uses of other Connections: this process has one login at a time.
            if other.conn_id == self._session.conn_id and self._end_tasks(other):
                self.should_stop |= other.stops
                self._orphans[key] = other
        return False

    def record_ended_use(self) -> ClusterUse | None:
        """Record when this use has ended, if another user needs that for its share of the cost."""
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
        """Return the uses whose cost is due, or why it is not known or not due.

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
            logger.warning("The cost of manifest %s is not known: %s", self._use.manifest, error)
            return str(error)

    def log_costs(self, uncharged: Uncharged | str, *, waits_for_stop: bool) -> list[Cost]:
        """Log the cost of each run, and return that of this use's run."""
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
        """Return the uncharged uses of each run that has ended, this run first, and the others."""
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
        """Return the keys of other users that have not ended: of this run, and of other runs."""
        users = [key for key in self._keys if not record.is_ended(key) and key not in self._orphans]
        run = self._use.owner.run
        of_this_run = [key for key in users if record.get_run_part(key) == run]
        return of_this_run, [key for key in users if key not in of_this_run]

    def erase_ended(self) -> None:
        """Erase the uses that have ended: of others if this was the last user, of its run if not.

        A use that has ended on its own stays on record for the others' shares.
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
        """Stop the cluster if that is wanted; return False if another user has come."""
        return not self.should_stop or _stop(self._session, self._use, ctx)

    def _end_tasks(self, use: ClusterUse) -> bool:
        """End the queries of the tasks that used the cluster; return whether all have ended."""
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
    """Stop the cluster unless a query runs on it; return False if another user has come."""
    manifest = use.manifest
    status = session.call(ctx.get_status) if ctx else None
    # After a stop, another user may have started a new cluster of the manifest.
    if status is None or not status.is_available():
        try:
            ctx = find_manifest(session, manifest)
        except misspecified_error() as error:
            logger.info("Manifest %s was registered anew, nothing to stop: %s", manifest, error)
            return True
        status = session.call(ctx.get_status) if ctx else None
    if ctx is None or status is None:
        logger.info("Manifest %s does not exist: nothing to stop", manifest)
        return True
    deadline = time.monotonic() + time_left(IDLE_WAIT_SECONDS)
    while status.name == "RUNNING":
        if time.monotonic() > deadline:
            logger.info(
                "Cluster %s runs on: a query of somebody else is running", get_cluster_id(ctx)
            )
            return True
        time.sleep(0.2)
        status = session.call(ctx.get_status)
    if not status.is_available():
        logger.info("Cluster of manifest %s is not running: nothing to stop", manifest)
        return True
    # Check again: another user may have come while the cluster became idle.
    if has_other_users(session, use):
        return False
    session.call(ctx.stop)
    logger.info("Cluster %s stopped", get_cluster_id(ctx))
    return True


def log_failures(left: Iterable[EndFailure]) -> None:
    """Log a warning for each failure."""
    for each in left:
        logger.warning("%s. It stays on record, for the next try, clean_up or the sweep", each)
