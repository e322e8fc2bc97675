"""A try of a task in Airflow's own context, without a scheduler, API server or database."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from uuid import uuid4

from airflow.sdk import DAG, BaseOperator
from airflow.sdk.exceptions import ErrorType
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.context import set_current_context
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

StartTry = Callable[..., AbstractContextManager[RuntimeTaskInstance]]


class Supervisor:
    """In place of the process that stands between a task and Airflow: one task's store and XComs.

    The store is the same for all tries of the task, and the states of tasks for all runs.
    """

    def __init__(self) -> None:
        self.store: dict[str, Any] = {}
        self.states: dict[str, str | None] = {"run_query": "failed"}
        self._xcoms: defaultdict[tuple[str, ...], dict[int, Any]] = defaultdict(dict)

    def send(self, msg: Any) -> object:
        match msg:
            case comms.GetTaskStateStore(key=key) if key in self.store:
                return comms.TaskStateStoreResult(value=self.store[key])
            case comms.GetTaskStateStore():
                return comms.ErrorResponse(error=ErrorType.TASK_STORE_NOT_FOUND)
            case comms.SetTaskStateStore(key=key, value=value):
                self.store[key] = value
            case comms.DeleteTaskStateStore(key=key):
                self.store.pop(key, None)
            case comms.SetXCom():
                self._xcoms[_place(msg)][msg.map_index] = msg.value
            case comms.GetXComSequenceSlice():
                return comms.XComSequenceSliceResult(root=list(self._xcoms[_place(msg)].values()))
            case comms.GetTaskStates(run_ids=[run_id]):
                return comms.TaskStatesResult(task_states={run_id: self.states})
            case comms.MaskSecret():
                pass
            case _:
                raise NotImplementedError(msg)
        return None


def _place(xcom: Any) -> tuple[str, ...]:
    return xcom.dag_id, xcom.run_id, xcom.task_id, xcom.key


@contextmanager
def start_try(
    try_number: int = 1,
    *,
    dag_id: str = "shop",
    task_id: str = "run_query",
    run_id: str = "manual__1",
    map_index: int = -1,
) -> Iterator[RuntimeTaskInstance]:
    """Run the body as a try of a task, on the supervisor that is set."""
    with DAG(dag_id, schedule=None):
        task = BaseOperator(task_id=task_id)
    ti = RuntimeTaskInstance.model_construct(
        id=uuid4(),
        dag_id=dag_id,
        task_id=task_id,
        run_id=run_id,
        try_number=try_number,
        map_index=map_index,
        task=task,
    )
    with set_current_context(ti.get_template_context()):
        yield ti
