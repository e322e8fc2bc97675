"""The record: entries that assign queries and clusters to tasks.

Each entry is an Airflow Variable. All tasks and the DAG processor can read and list Variables, and
a Variable remains when its worker is killed. An entry exists while its query or its cluster is in
use. The entry of an ended use stays until the last user is done, if other users share its cost.
While a task is active, only the task itself writes its entries. Keys consist of digests, because a
key has at most 250 characters, and because Airflow masks the value of a key that looks like a
secret's.

Airflow's `task_state_store` and `ResumableJobMixin` cannot be used: only the task itself can read
its state there. Other users of a cluster and callbacks cannot.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from airflow.sdk import Variable, get_current_context

from ..cloud.retry import in_thread
from ..compat import variable_keys
from ..compat.internals import TASK_ENDS, get_task_states, read_variable

T = TypeVar("T")
Dataset = tuple[str, str]
"""Namespace and name of a dataset. When loaded from the record, a list of the two."""

VERSION = 2
PREFIX = "polars_cloud"
TASKS, CLUSTERS = f"{PREFIX}/task/", f"{PREFIX}/cluster/"
"""Prefixes of the keys of all tasks and of all uses of clusters."""
ENDED = "-"
"""Separator in the key of an ended use, before the time of its end."""


class Owner(NamedTuple):
    """Owner of an entry: a task of a run, or the whole run, named by its task `start_cluster`."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    whole_run: bool = False

    @classmethod
    def current(cls, *, whole_run: bool = False) -> Owner:
        """Return the task that is running."""
        ti = get_current_context()["ti"]
        map_index = -1 if ti.map_index is None else ti.map_index
        return cls(ti.dag_id, ti.run_id, ti.task_id, map_index, whole_run)

    def __str__(self) -> str:
        index = f"[{self.map_index}]" if self.map_index >= 0 else ""
        return f"{self.dag_id}.{self.task_id}{index} in run {self.run_id}"

    @property
    def run(self) -> str:
        """Digest of the run, a part of the keys of its entries."""
        return digest(self.dag_id, self.run_id)

    @property
    def task(self) -> str:
        """Digest of the task in its run, a part of the keys of its entries."""
        return digest(self.task_id, self.map_index, self.whole_run)

    def is_active(self) -> bool:
        """Return whether the owner has not ended, according to Airflow."""
        return not self._get_states() <= TASK_ENDS

    def is_deferred(self) -> bool:
        """Return whether the task waits for its trigger, according to Airflow."""
        return self._get_states() == {"deferred"}

    def _get_states(self) -> set[str | None]:
        task_id = None if self.whole_run else self.task_id
        return in_thread(lambda: get_task_states(self.dag_id, self.run_id, task_id, self.map_index))


@dataclass
class Stored:
    """Base class of entries and their parts, which are stored as JSON objects.

    During an upgrade, two releases share the record. Fields that this release does not know are
    kept in `unknown`, and written again. The stored name of a field never changes.
    """

    STORED_AS: ClassVar[dict[str, str]] = {}
    """Stored names of fields whose name in the code has changed."""

    unknown: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @classmethod
    def load(cls, stored: dict[str, Any]) -> Self:
        names = {cls.STORED_AS.get(each.name, each.name): each.name for each in fields(cls)}
        del names["unknown"]
        known = {names[key]: value for key, value in stored.items() if key in names}
        return cls(**known, unknown={k: v for k, v in stored.items() if k not in names})

    def dump(self) -> dict[str, Any]:
        values = {
            self.STORED_AS.get(each.name, each.name): getattr(self, each.name)
            for each in fields(self)
            if each.name != "unknown"
        }
        return self.unknown | values


@dataclass
class QueryRecord(Stored):
    """A query that a task is submitting or has submitted.

    Attributes
    ----------
    cluster_id, manifest
        Cluster that runs the query, and its manifest.
    known
        Ids of earlier queries with the same destination on the cluster.
    try_number
        Try that submitted the query.
    destination
        URI that the query writes to; empty for a temporary result or several destinations.
    has_location
        Whether the query has a `location` once it has succeeded.
    query_id, page, submitted_at
        Set after the submission; the time is in seconds since the epoch.
    inputs, outputs
        Namespaces and names of the datasets that it reads and writes; None without OpenLineage.
    """

    cluster_id: str
    manifest: str
    known: list[str]
    try_number: int = 1
    destination: str = ""
    has_location: bool = True
    query_id: str | None = None
    page: str = ""
    submitted_at: float | None = None
    inputs: list[Dataset] | None = None
    outputs: list[Dataset] | None = None

    def dump(self) -> dict[str, Any]:
        """Omit fields without a value, because older releases treat stored fields as set."""
        return {key: value for key, value in super().dump().items() if value not in (None, "")}


@dataclass
class Result(Stored):
    """Location and row count of a query's result; `rows` is None if unknown."""

    location: list[str] = field(default_factory=list)
    rows: int | None = None


@dataclass
class Wait(Stored):
    """State of a deferred task, with which the task is resumed.

    Attributes
    ----------
    since
        Start of the wait, in seconds since the epoch.
    cluster
        Id of the cluster that is starting; empty if the task waits for queries.
    returned, outlet_events
        Return value of the task's function, with names in place of queries, and the outlet events
        that it has set; both serialized as for an XCom.
    results
        Results of the queries that have ended, by name.
    """

    since: float
    cluster: str = ""
    returned: Any = None
    outlet_events: Any = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)

    @classmethod
    def load(cls, stored: dict[str, Any]) -> Self:
        results = {name: Result.load(value) for name, value in stored.get("results", {}).items()}
        return super().load(stored | {"results": results})

    def dump(self) -> dict[str, Any]:
        return super().dump() | {"results": {k: each.dump() for k, each in self.results.items()}}


@dataclass
class TaskRecord(Stored):
    """Entry of a try of a task.

    Attributes
    ----------
    clear_number
        Number of times that the run had been cleared when the try began.
    is_stale
        Whether the task has failed or was cleared. Its queries are then canceled, not resumed.
    queries
        Queries by name. The name is the destination, a URI or a table, or the digest of a temporary
        result.
    cluster_uses
        Keys of the entries of the task's cluster uses.
    waits_for
        State of the wait while the task is deferred.
    deadline
        End of its `execution_timeout`, in seconds since the epoch; None without one.
    """

    STORED_AS = {"is_stale": "over", "cluster_uses": "kept"}  # noqa: RUF012

    owner: Owner
    conn_id: str
    clear_number: int = 0
    is_stale: bool = False
    queries: dict[str, QueryRecord] = field(default_factory=dict)
    cluster_uses: list[str] = field(default_factory=list)
    waits_for: Wait | None = None
    deadline: float | None = None
    version: int = VERSION

    @classmethod
    def load(cls, stored: dict[str, Any]) -> Self:
        queries = {name: QueryRecord.load(each) for name, each in stored["queries"].items()}
        waits_for = Wait.load(stored["waits_for"]) if stored["waits_for"] else None
        owner = Owner(*stored["owner"])
        return super().load(stored | {"owner": owner, "queries": queries, "waits_for": waits_for})

    def dump(self) -> dict[str, Any]:
        return super().dump() | {
            "queries": {name: each.dump() for name, each in self.queries.items()},
            "waits_for": self.waits_for.dump() if self.waits_for else {},
        }


@dataclass
class ClusterUse(Stored):
    """Entry of a use of a manifest's cluster.

    Attributes
    ----------
    stops
        Whether the last user stops the cluster; otherwise its idle timeout does.
    clusters
        Start of the use of each cluster, by cluster id, in seconds since the epoch. 0 if the use
        started with the cluster.
    nodes, vcpus, seen_at
        Number of nodes of the latest cluster, their total vCPUs if known, and the start of its use,
        in seconds since the epoch.
    until
        End of the use, in seconds since the epoch. Set only while other users share the cost.
    is_charged
        Whether the cost of this ended use was logged.
    """

    owner: Owner
    conn_id: str
    manifest: str
    stops: bool = True
    clusters: dict[str, float] = field(default_factory=dict)
    nodes: int = 1
    vcpus: int | None = None
    seen_at: float | None = None
    until: float | None = None
    is_charged: bool = False
    version: int = VERSION

    @classmethod
    def load(cls, stored: dict[str, Any]) -> Self:
        return super().load(stored | {"owner": Owner(*stored["owner"])})

    @property
    def key(self) -> str:
        key = cluster_prefix(self.manifest) + f"{self.owner.run}/{self.owner.task}"
        return key if self.until is None else f"{key}{ENDED}{self.until:.3f}"

    def add_cluster(
        self, cluster_id: str, nodes: int, vcpus: int | None, *, has_started: bool
    ) -> None:
        """Add a cluster, used from now on, or from its start if the owner has started it."""
        self.nodes, self.vcpus, self.seen_at = nodes, vcpus, time.time()
        self.clusters[cluster_id] = 0.0 if has_started else self.seen_at

    def merge(self, earlier: ClusterUse) -> None:
        """Add an earlier use by the same owner."""
        self.stops |= earlier.stops
        self.unknown = earlier.unknown | self.unknown
        if earlier.clusters.keys() >= self.clusters.keys():
            self.nodes, self.vcpus = earlier.nodes, earlier.vcpus
            self.seen_at = earlier.seen_at
        # The latest cluster stays the last one in the dict.
        self.clusters = {
            cluster_id: min(since, earlier.clusters.get(cluster_id, since))
            for cluster_id, since in (earlier.clusters | self.clusters).items()
        }


def task_key(owner: Owner, ti_id: object = "") -> str:
    """Return the key of a try's entry; without `ti_id`, the prefix of the task's tries."""
    return f"{TASKS}{owner.run}/{owner.task}/{ti_id}"


def cluster_prefix(manifest: str) -> str:
    """Return the prefix of the keys of all uses of the manifest's cluster."""
    return f"{CLUSTERS}{digest(manifest)}/"


def is_ended(key: str) -> bool:
    """Return whether the key is that of an ended cluster use."""
    return key.startswith(CLUSTERS) and ENDED in key


def get_run_part(key: str) -> str:
    """Return the part of a use's key that names the run, `Owner.run`."""
    _, _, _, run, _ = key.split("/")
    return run


def get_owner_part(key: str) -> str:
    """Return the part of a key that names the owner: the same for a task and its cluster uses."""
    _, kind, *parts = key.split("/")
    return "/".join(parts[:2] if f"{PREFIX}/{kind}/" == TASKS else parts[1:])


def put(key: str, entry: TaskRecord | ClusterUse) -> None:
    """Write an entry."""
    value = entry.dump()
    description = f"In use by {entry.owner}"

    def write() -> None:
        variable_keys.add(key)
        Variable.set(key, value, description=description, serialize_json=True)

    _serialized(write)


def get_task(key: str) -> TaskRecord | None:
    """Return the entry of a try of a task, or None if it does not exist."""
    stored = _get(key)
    return None if stored is None else TaskRecord.load(stored)


def get_use(key: str) -> ClusterUse | None:
    """Return the entry of a cluster use, or None if it does not exist."""
    stored = _get(key)
    return None if stored is None else ClusterUse.load(stored)


def find_keys(prefix: str, run: str = "") -> list[str]:
    """Return the keys of entries that begin with the prefix, of all runs or of one."""
    return _serialized(lambda: variable_keys.find(prefix, run))


def erase(key: str) -> None:
    """Delete an entry."""

    def delete() -> None:
        Variable.delete(key)
        variable_keys.remove(key)

    _serialized(delete)


def digest(*parts: object) -> str:
    """Return a digest of the parts, as 16 hexadecimal digits."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _get(key: str) -> dict[str, Any] | None:
    stored: dict[str, Any] | None = _serialized(lambda: read_variable(key))
    return stored


_lock = threading.Lock()


def _serialized(function: Callable[[], T]) -> T:
    """Call in a thread, one call at a time: a signal interrupts a caller, but not its call."""

    def call() -> T:
        with _lock:
            return function()

    return in_thread(call)
