"""Functions that use private names of Airflow; no other module does."""

import json
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import Context
from airflow.sdk.bases.operator import TRIGGER_FAIL_REPR
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time import comms, task_runner

from .versions import COUNTS_CLEARED_TASKS, VERSION

TASK_ENDS = {"success", "failed", "skipped", "upstream_failed", "removed"}
"""States of a task that has ended."""


def has_supervisor() -> bool:
    """Return whether a supervisor is attached. `dag.test()` runs callbacks without one."""
    return hasattr(task_runner, "SUPERVISOR_COMMS")


def is_dag_test() -> bool:
    """Return whether this is `dag.test()`, whose supervisor serves one thread at a time."""
    from airflow.sdk.execution_time.supervisor import InProcessSupervisorComms

    return isinstance(task_runner.SUPERVISOR_COMMS, InProcessSupervisorComms)


def read_variable(key: str) -> Any:
    """Return a Variable's value, parsed from JSON, or None if the Variable does not exist.

    `Variable.get` cannot be used: it returns its default even if Airflow does not answer.

    Raises
    ------
    AirflowRuntimeError
        Airflow does not answer.
    """
    try:
        answer = task_runner.SUPERVISOR_COMMS.send(comms.GetVariable(key=key))
    except AirflowRuntimeError as error:
        answer = error.error
    if isinstance(answer, comms.VariableResult):
        return None if answer.value is None else json.loads(answer.value)
    assert isinstance(answer, comms.ErrorResponse), "no other type of answer exists"
    if answer.error == ErrorType.VARIABLE_NOT_FOUND:
        return None
    raise AirflowRuntimeError(answer)


def get_task_states(
    dag_id: str, run_id: str, task_id: str | None = None, map_index: int = -1
) -> set[str | None]:
    """Return the states of a run's tasks, or of one task; empty if the run or task is deleted."""
    states = task_runner.RuntimeTaskInstance.get_task_states(
        dag_id,
        run_ids=[run_id],
        task_ids=[task_id] if task_id else None,
        map_index=map_index if map_index >= 0 else None,
    )
    return set(states.get(run_id, {}).values())


def get_clear_number(context: Context) -> int:
    """Return a number that grows when the task or its run is cleared, but not with a retry.

    Airflow 3.1 counts only clears of finished runs. There, the task's `max_tries` is added, which
    grows when the task is cleared.
    """
    number = context["dag_run"].clear_number or 0
    return number if COUNTS_CLEARED_TASKS else number + context["ti"].max_tries


def is_resumed(context: Context) -> bool:
    """Return whether this try resumes after a deferral."""
    from_server = cast("task_runner.RuntimeTaskInstance", context["ti"])._ti_context_from_server
    return from_server is not None and from_server.next_method is not None


def is_trigger_failure(next_method: str) -> bool:
    """Return whether the task is resumed because its trigger failed or timed out."""
    return next_method == TRIGGER_FAIL_REPR


# In the API server


def require_access_to_variables() -> Any:
    """Return a FastAPI dependency that refuses users who may not read Airflow's Variables."""
    from airflow.api_fastapi.core_api.security import requires_access_variable

    return requires_access_variable("GET")


def find_variables(prefix: str) -> dict[str, str]:
    """Return the Variables whose keys begin with the prefix, as JSON texts by key.

    They are read from Airflow's database.
    """
    from airflow.models import Variable
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        found = session.scalars(select(Variable).where(Variable.key.startswith(prefix)))  # noqa: AIR311
        return {each.key: each.val for each in found}


def find_states(dag_id: str, run_id: str) -> dict[tuple[str, int], str | None]:
    """Return the states of a run's tasks by id and map index, from Airflow's database."""
    from airflow.models import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    columns = TaskInstance.task_id, TaskInstance.map_index, TaskInstance.state
    of_run = select(*columns).where(TaskInstance.dag_id == dag_id, TaskInstance.run_id == run_id)
    with create_session() as session:
        return {
            (task_id, map_index): state for task_id, map_index, state in session.execute(of_run)
        }


def get_python_operators() -> set[type]:
    """Return the operators of Airflow that run a Python function in the task's own process."""
    from airflow.providers.standard.decorators import branch_python, python, short_circuit
    from airflow.providers.standard.operators.python import PythonOperator

    # Not by their names, which are private: without one, the API server would show no DAG.
    return {
        each
        for module in (python, branch_python, short_circuit)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, PythonOperator)
    }


def read_link(name: str, xcom_key: str, operator: Any, ti_key: Any) -> str:
    """Return the address that a task's worker has stored for a link, or an empty string."""
    if TYPE_CHECKING or VERSION >= (3, 2):
        from airflow.serialization.definitions.operatorlink import XComOperatorLink
    else:
        from airflow.serialization.serialized_objects import XComOperatorLink
    link = XComOperatorLink(name=name, xcom_key=xcom_key)
    return link.get_link(operator, ti_key=ti_key)
