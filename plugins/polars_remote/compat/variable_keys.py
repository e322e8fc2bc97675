"""Find the record's Variables by their keys, even if Airflow cannot list Variables.

Before Airflow 3.3, the keys are kept in lists, which are Variables, too. Tasks share most lists,
and Airflow has no conditional write. So each writer reads the list again a little later, and
repeats its change if another writer has undone it. Two simultaneous writers may still lose a key. A
cluster may then seem unused between two queries, and `clean_up` may miss an orphan. Only the list
of a task's tries is not shared.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable

from airflow.sdk import Variable

from .internals import read_variable
from .versions import LISTS_VARIABLES

LISTS = "polars_cloud/keys"
"""Prefix of the keys of the lists."""

MAX_WRITES = 50
"""Maximum writes of a list by one change; other writers may undo some."""

SHARDS = 8
"""Number of parts of a shared list, so that writers seldom collide."""


def find(prefix: str, run: str = "") -> list[str]:
    """Return the keys that begin with the prefix; of one run, if it is given.

    Parameters
    ----------
    prefix
        `polars_cloud/task/<run>/`, or `.../<run>/<task>/`, or `polars_cloud/cluster/<manifest>/`.
        `polars_cloud/cluster/` needs the run, too, before Airflow 3.3.
    """
    if LISTS_VARIABLES:
        keys = list(Variable.keys(prefix=prefix))
    else:
        keys = [key for name in _lists_below(prefix, run) for key in _read(name)]
    return [key for key in keys if key.startswith(prefix) and run in ("", *key.split("/"))]


def add(key: str) -> None:
    """Add a key to its lists, before its Variable is written.

    Raises
    ------
    RuntimeError
        A list is not read as it was written.
    """
    _change(key, lambda known: known if key in known else [*known, key])


def remove(key: str) -> None:
    """Remove a key from its lists, after its Variable was deleted. Raises what `add` raises."""
    _change(key, lambda known: [each for each in known if each != key])


def _change(key: str, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lists that hold a key, and again where another writer has undone it."""
    if LISTS_VARIABLES:
        return
    for name in _lists_of(key):
        for _ in range(MAX_WRITES):
            began = time.monotonic()
            known = _read(name)
            changed = change(known)
            if changed == known:
                break
            if changed:
                Variable.set(name, changed, serialize_json=True)
            else:
                Variable.delete(name)
            _let_others_write(began)
        else:
            raise RuntimeError(
                f"Variable {name} was written {MAX_WRITES} times, and is never read as it was "
                "written. If a secrets backend answers for it, exclude the Variables below "
                "polars_cloud/ there"
            )


def _lists_of(key: str) -> list[str]:
    """Return the lists that hold a key: its run's, and its task's or its manifest's."""
    shard = int(hashlib.sha256(key.encode()).hexdigest(), 16) % SHARDS
    match key.split("/"):
        case [_, "task", run, task, _]:
            return [f"{LISTS}/tries/{run}/{task}", f"{LISTS}/run/{run}/{shard}"]
        case [_, "cluster", manifest, run, _]:
            return [f"{LISTS}/users/{manifest}/{shard}", f"{LISTS}/run/{run}/{shard}"]
        case _:
            raise ValueError(f"{key!r} is no key of the record")


def _lists_below(prefix: str, run: str) -> list[str]:
    match prefix.rstrip("/").split("/"):
        case [_, "task", of_run, task]:
            return [f"{LISTS}/tries/{of_run}/{task}"]
        case [_, "cluster", manifest]:
            shared = f"users/{manifest}"
        case [_, "task", of_run]:
            shared = f"run/{of_run}"
        case _:
            shared = f"run/{run}"
    return [f"{LISTS}/{shared}/{shard}" for shard in range(SHARDS)]


def _read(name: str) -> list[str]:
    known: list[str] | None = read_variable(name)
    return known or []


def _let_others_write(began: float) -> None:
    """Wait longer than another writer takes from its read to its write."""
    time.sleep((time.monotonic() - began) * random.uniform(2, 3))
