"""Polling and progress-log intervals."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from ..cloud.client import get_stages

if TYPE_CHECKING:
    from polars_cloud import DirectQuery, QueryStatus

LOG_AFTER_SECONDS = (60, 120, 300, 600, 1200, 1800)
"""Log progress after these seconds, then every 1,800."""

FIRST_POLL_SECONDS, SHORT_QUERY_POLL_SECONDS, LONG_QUERY_POLL_SECONDS = 0.5, 1.5, 8.0
"""Triggerer poll intervals in seconds: the first, the longest of a short query, and the longest."""

SHORT_QUERY_SECONDS = 300.0
"""Age in seconds up to which a query counts as short."""


def get_poll_interval(age: float) -> float:
    """Return the poll interval in seconds for a query of this age."""
    if age < SHORT_QUERY_SECONDS:
        return min(FIRST_POLL_SECONDS + age / 60, SHORT_QUERY_POLL_SECONDS)
    return min(age / SHORT_QUERY_SECONDS * SHORT_QUERY_POLL_SECONDS, LONG_QUERY_POLL_SECONDS)


class Progress:
    """Times at which to log the progress of a wait that began at `since`."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._next = self._after(time.time() - since)

    def should_log(self) -> bool:
        """Return whether to log now. True at most once per interval."""
        age = time.time() - self._since
        if age < self._next:
            return False
        self._next = self._after(age)
        return True

    @staticmethod
    def _after(age: float) -> float:
        for seconds in LOG_AFTER_SECONDS:
            if age < seconds:
                return seconds
        last = LOG_AFTER_SECONDS[-1]
        return (age // last + 1) * last


def describe_progress(query: DirectQuery, status: QueryStatus, age: float) -> str:
    """Return a text with a query's status, stages if known, and age; `age` is in seconds."""
    stages = ""
    with suppress(RuntimeError):  # the cluster's observatory may be unreachable
        done, of_all = get_stages(query)
        stages = f", {done} of {of_all} stages" if of_all else ""
    return f"{status.name}{stages} after {age / 60:.0f} min"
