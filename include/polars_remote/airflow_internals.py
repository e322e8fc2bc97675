"""All that this folder takes from Airflow and that is not part of its public interface."""

from typing import cast

from airflow.sdk import Context
from airflow.sdk.bases.operator import TRIGGER_FAIL_REPR
from airflow.sdk.execution_time import task_runner

TASK_ENDS = {"success", "failed", "skipped", "upstream_failed", "removed"}
"""States of tasks that are neither running nor to run."""


def has_supervisor() -> bool:
    """Whether somebody answers for Airflow: not in a callback of `dag.test()`."""
    return hasattr(task_runner, "SUPERVISOR_COMMS")


def get_task_states(
    dag_id: str, run_id: str, task_id: str | None = None, map_index: int = -1
) -> set[str | None]:
    """States of a run's tasks, or of one of them; empty if the run or the task is gone."""
    states = task_runner.RuntimeTaskInstance.get_task_states(
        dag_id,
        run_ids=[run_id],
        task_ids=[task_id] if task_id else None,
        map_index=map_index if map_index >= 0 else None,
    )
    return set(states.get(run_id, {}).values())


def get_clear_number(context: Context) -> int:
    """How often tasks of the run were cleared before this try of the task began."""
    return context["dag_run"].clear_number or 0


def is_resumed(context: Context) -> bool:
    """Whether this try of the task has been deferred before."""
    from_server = cast("task_runner.RuntimeTaskInstance", context["ti"])._ti_context_from_server
    return from_server is not None and from_server.next_method is not None


def has_lost_its_trigger(next_method: str) -> bool:
    """Whether a task is resumed because its trigger has failed, or has not fired in time."""
    return next_method == TRIGGER_FAIL_REPR
