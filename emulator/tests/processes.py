"""Queries of the operating system about processes."""

from collections.abc import Iterable

import psutil


def is_running(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def none_running(pids: Iterable[int]) -> bool:
    return not any(map(is_running, pids))


def descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
