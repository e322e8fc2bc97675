"""Let a task clean up when Airflow kills it."""

from airflow.sdk import get_current_context

GRACE = 4.0
"""Seconds to clean up in; Airflow sends SIGKILL 5 seconds after SIGTERM."""


def unwind_when_killed() -> None:
    """Make Airflow's SIGTERM raise `SystemExit` in the current task.

    By itself a `@task` that is marked failed, cleared or out of its run's time gets no exception
    and runs no `finally`: the runner's signal handler calls `on_kill`, which does nothing for it.
    """

    def on_kill() -> None:
        raise SystemExit(143)

    get_current_context()["ti"].task.on_kill = on_kill  # type: ignore[method-assign]
