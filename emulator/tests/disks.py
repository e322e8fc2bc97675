"""Simulation of a full disk."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def full_disk(pid: int) -> Iterator[None]:
    """Make all file writes of a process fail while the context is open."""
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, most))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
