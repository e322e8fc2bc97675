"""Find the keys of the record's Variables, even if Airflow cannot list Variables.

Before Airflow 3.3, the keys are stored in lists, which are Variables, too. Tasks share most lists,
and Airflow has no conditional write. Each writer therefore reads the list again a little later, and
repeats its change if another writer has undone it. Two simultaneous writers may still lose a key.
In that case, a cluster may seem unused between two queries, and `clean_up` may miss an orphan. The
list of a task's tries is not shared, so its keys cannot be lost.
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
"""Maximum attempts to change a list, because other writers may undo a change."""

SHARDS = 8
"""Number of parts of each shared list, to make simultaneous writes rare."""


def find(prefix: str, run: str = "") -> list[str]:
    """Return the keys that begin with the prefix, of all runs or of one.

    Parameters
    ----------
    prefix
        `polars_cloud/task/<run>/`, or `.../<run>/<task>/`, or `polars_cloud/cluster/<manifest>/`.
        Before Airflow 3.3, `polars_cloud/cluster/` is possible only with a run.
    run
        `Owner.run`; all runs if empty.
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
        The written list could not be read back.
    """
    _change(key, lambda known: known if key in known else [*known, key])


def remove(key: str) -> None:
    """Remove a key from its lists, after its Variable was deleted. Raises as `add` does."""
    _change(key, lambda known: [each for each in known if each != key])


def _change(key: str, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lists that hold a key; repeat the change if another writer has undone it."""
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
                f"Variable {name} was written {MAX_WRITES} times, but reading it never returned "
                "what was written. If a secrets backend has such a Variable, exclude Variables "
                "below polars_cloud/ from that backend"
            )


def _lists_of(key: str) -> list[str]:
    """Return the lists that hold a key: the list of its run, and of its task or manifest."""
    shard = int(hashlib.sha256(key.encode()).hexdigest(), 16) % SHARDS
    match key.split("/"):
        case [_, "task", run, task, _]:
            return [f"{LISTS}/tries/{run}/{task}", f"{LISTS}/run/{run}/{shard}"]
        case [_, "cluster", manifest, run, _]:
            return [f"{LISTS}/users/{manifest}/{shard}", f"{LISTS}/run/{run}/{shard}"]
        case _:
            raise ValueError(f"{key!r} is not a key of the record")


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
