"""The record of who owns what: which query and which cluster belongs to which task.

An entry is an Airflow Variable. Only Variables are seen by each task of each DAG and by the DAG
processor, outlive a worker that is killed, and can be listed. An entry exists while a query or a
cluster is in use, and has a single writer: the task that its key names. Keys are digests: they may
have 250 characters, and a name in them could be taken for a secret's, whose value is masked.

`task_state_store` and `ResumableJobMixin`, which is built on it, show an entry to its own task
alone, and tell neither of the other users of a cluster nor of what a killed task has left.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from airflow.sdk import Variable, get_current_context

from . import variable_keys
from .airflow_internals import TASK_ENDS, get_task_states
from .outages import in_thread

T = TypeVar("T")

PREFIX = "polars_cloud"
TASK, CLUSTER = "task", "cluster"
TASKS = f"{PREFIX}/{TASK}/"
"""What the keys of all tasks begin with."""

Value = dict[str, Any]


class Owner(NamedTuple):
    """A task of a run; for a shared cluster the run as a whole, by the task that starts it."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    whole_run: bool = False

    @classmethod
    def current(cls, *, whole_run: bool = False) -> Owner:
        ti = get_current_context()["ti"]
        map_index = -1 if ti.map_index is None else ti.map_index
        return cls(ti.dag_id, ti.run_id, ti.task_id, map_index, whole_run)

    @property
    def run(self) -> str:
        return digest(self.dag_id, self.run_id)

    @property
    def task(self) -> str:
        return digest(self.task_id, self.map_index, self.whole_run)

    def goes_on(self) -> bool:
        """Whether Airflow has not yet ended the owner."""
        task_id = None if self.whole_run else self.task_id
        states = in_thread(
            lambda: get_task_states(self.dag_id, self.run_id, task_id, self.map_index)
        )
        return not states <= TASK_ENDS


def task_key(owner: Owner, ti_id: object = "") -> str:
    """Key of what a try of a task has submitted; without the try's id, the prefix of all tries."""
    return f"{PREFIX}/{TASK}/{owner.run}/{owner.task}/{ti_id}"


def cluster_key(manifest: str, owner: Owner) -> str:
    """Key of an owner's use of a manifest's cluster."""
    return f"{PREFIX}/{CLUSTER}/{digest(manifest)}/{owner.run}/{owner.task}"


def put(key: str, owner: Owner, value: Value) -> None:
    """Write an entry."""
    entry = {"owner": list(owner), **value}
    description = f"In use by {owner.dag_id}.{owner.task_id}, run {owner.run_id}"

    def write() -> None:
        variable_keys.note(key)
        Variable.set(key, entry, description=description, serialize_json=True)

    _in_turn(write)


def get(key: str) -> tuple[Owner, Value] | None:
    """Read an entry; None if it is gone."""
    entry: Value | None = _in_turn(lambda: Variable.get(key, default=None, deserialize_json=True))
    return None if entry is None else (Owner(*entry["owner"]), entry)


def keys(prefix: str, run: str = "") -> list[str]:
    """The keys that begin with the prefix; of one run, if it is given."""
    return _in_turn(lambda: variable_keys.find(prefix, run))


def erase(key: str) -> None:
    """Delete an entry."""

    def delete() -> None:
        Variable.delete(key)
        variable_keys.forget(key)

    _in_turn(delete)


_turn = threading.Lock()


def _in_turn(function: Callable[[], T]) -> T:
    """Call in a thread, after what an earlier caller was interrupted in has been carried out."""

    def call() -> T:
        with _turn:
            return function()

    return in_thread(call)


def task_entries(dag_id: str, run_id: str) -> Iterator[tuple[str, Owner, Value]]:
    """What the tasks of a run have submitted: key, owner and value of each entry."""
    yield from _entries(keys(f"{PREFIX}/{TASK}/{digest(dag_id, run_id)}/"))


def cluster_entries(dag_id: str, run_id: str) -> Iterator[tuple[str, Owner, Value]]:
    """The clusters that a run and its tasks use: key, owner and value of each entry."""
    yield from _entries(keys(f"{PREFIX}/{CLUSTER}/", digest(dag_id, run_id)))


def _entries(keys: Iterable[str]) -> Iterator[tuple[str, Owner, Value]]:
    for key in keys:
        if entry := get(key):
            yield key, *entry


def has_other_users(manifest: str, owner: Owner) -> bool:
    """Whether anybody but this owner uses the manifest's cluster; erases what nobody uses."""
    for key in keys(f"{PREFIX}/{CLUSTER}/{digest(manifest)}/"):
        if key != cluster_key(manifest, owner) and (entry := get(key)):
            if entry[0].goes_on():
                return True
            erase(key)
    return False


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
