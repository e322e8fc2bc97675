"""Distinguish a task that was ended by a user from a worker that is shutting down."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..cloud.retry import in_thread, time_limit
from ..compat.internals import get_task_states
from .record import Owner

logger = logging.getLogger(__name__)

GRACE_SECONDS = 4.0
"""Seconds to end a killed task's queries. Airflow sends SIGKILL 5 seconds after SIGTERM."""

STATE_CALL_SECONDS = 1.5
"""Share of GRACE_SECONDS for asking Airflow about the task's state."""

ENDED_BY_USER = {"failed", "success", "skipped", "restarting", "upstream_failed", "removed"}
"""States of a task that was marked or cleared while it ran, or whose run timed out."""


class TaskKilled(SystemExit):
    """Airflow has sent SIGTERM. With this exit code, Airflow counts the try as failed."""

    def __init__(self) -> None:
        super().__init__(143)
        self.deadline = time.monotonic() + GRACE_SECONDS


def is_ended_by_user(owner: Owner) -> bool:
    """Return whether a user or the run's time-out has ended the task.

    Airflow sends SIGTERM when a user marks or clears the task, but also when the worker shuts down
    or cannot reach the API server. Only the task's state shows the difference. If Airflow does not
    answer, return False: the queries keep running.
    """
    try:
        states = in_thread(
            lambda: get_task_states(owner.dag_id, owner.run_id, owner.task_id, owner.map_index),
            STATE_CALL_SECONDS,
        )
    except Exception as error:
        logger.warning(
            "The worker is shutting down, and Airflow did not report the task's state. The task's "
            "queries keep running; the next try resumes them (%s)",
            error,
        )
        return False
    if not states <= ENDED_BY_USER:
        logger.warning(
            "The worker is shutting down. The task's queries keep running; the next try resumes "
            "them"
        )
        return False
    return True


@contextmanager
def limit_to_grace_period(error: BaseException | None) -> Iterator[None]:
    """Limit the calls in the block to the time before SIGKILL, if the error is a kill."""
    if isinstance(error, TaskKilled):
        with time_limit(error.deadline - time.monotonic()):
            yield
    else:
        yield
