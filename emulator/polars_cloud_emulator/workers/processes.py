"""Processes below a worker: what a user's function starts ends with its query.

Linux knows all of them, even those that left their group; elsewhere only the group is found.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

SET_PARENT_DEATH_SIGNAL = 1
SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends."""
    _control_process(SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Let this process be killed as soon as its parent ends, however that ends."""
    _control_process(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def prefer_as_oom_victim() -> None:
    """Let a system without memory kill this process rather than any other."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def kill_group(leader: int) -> None:
    """Kill a child that has not been waited for, with its group."""
    _kill([leader])
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def end_children() -> None:
    """Kill every child of this process, and what becomes one by that; return when all are gone."""
    with contextlib.suppress(ChildProcessError):
        while True:
            _kill(_children())
            os.waitpid(-1, 0)


def kill_processes_of(folder: Path) -> None:
    """Kill each process whose variables name a folder, as those below a worker's name its own."""
    name = os.fsencode(folder)
    for variables in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if name in variables.read_bytes():
                _kill([int(variables.parent.name)])


def describe_exit(code: int) -> str:
    """How a process ended; the code is negative for a signal."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _children() -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return [int(pid) for pid in children.split()]
    return []


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _control_process(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
