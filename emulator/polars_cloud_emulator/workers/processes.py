"""Descendants of a worker process: whatever a user's function starts is killed with its query.

On Linux all descendants are found, on other systems only those in the same process group.
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
    """Become the parent of all orphaned descendants."""
    _control_process(SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have this process killed as soon as its parent ends."""
    _control_process(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def prefer_as_oom_victim() -> None:
    """Make this process the preferred victim of the system's out-of-memory killer."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def kill_group(leader: int) -> None:
    """Kill a child that has not been reaped, with its process group."""
    _kill([leader])
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def end_children() -> None:
    """Kill and reap all children of this process, including those that it adopts meanwhile."""
    with contextlib.suppress(ChildProcessError):
        while True:
            _kill(_children())
            os.waitpid(-1, 0)


def kill_processes_of(folder: Path) -> None:
    """Kill all processes whose environment contains a folder, as the processes of a worker do."""
    name = os.fsencode(folder)
    for variables in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if name in variables.read_bytes():
                _kill([int(variables.parent.name)])


def describe_exit(code: int) -> str:
    """Return a description of an exit code, which is negative for a signal."""
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
