"""Distinguish a task that a user has ended from a worker that is shutting down."""

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
"""Seconds for ending a killed task's queries; Airflow sends SIGKILL 5 seconds after SIGTERM."""

STATE_CALL_SECONDS = 1.5
"""Share of GRACE_SECONDS for asking Airflow about the task's state."""

ENDED_BY_USER = {"failed", "success", "skipped", "restarting", "upstream_failed", "removed"}
"""States of a task that was marked or cleared while it ran, or whose run timed out."""


class TaskKilled(SystemExit):
    """Airflow's SIGTERM; the exit code tells Airflow that the try failed."""

    def __init__(self) -> None:
        super().__init__(143)
        self.deadline = time.monotonic() + GRACE_SECONDS


def is_ended_by_user(owner: Owner) -> bool:
    """Return whether a user or the run's time-out has ended the task.

    Airflow sends SIGTERM after a user's click, and also when a worker shuts down or loses the API
    server. Only the task's state shows which. If Airflow does not answer, the queries run on.
    """
    try:
        states = in_thread(
            lambda: get_task_states(owner.dag_id, owner.run_id, owner.task_id, owner.map_index),
            STATE_CALL_SECONDS,
        )
    except Exception as error:
        logger.warning(
            "The worker is shutting down, and Airflow does not say why. The task's queries keep "
            "running; the next try resumes them (%s)",
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
    """If the error is a kill, limit the calls in the body to the time before SIGKILL."""
    if isinstance(error, TaskKilled):
        with time_limit(error.deadline - time.monotonic()):
            yield
    else:
        yield
