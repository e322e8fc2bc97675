"""A try of a task in Airflow's own context, without a scheduler, API server or database."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any, Generic, TypeVar
from uuid import UUID

import pytest
from airflow.sdk import DAG, BaseOperator, get_current_context
from airflow.sdk.exceptions import ErrorType, TaskDeferred
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.context import set_current_context
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.sdk.serde import deserialize, serialize
from uuid6 import uuid7

from include.auth import authenticate
from polars_remote import query_task
from polars_remote.ownership.kills import TaskKilled
from polars_remote.ownership.scope import TaskScope, task_scope

T = TypeVar("T")

RUN_START = datetime.now(UTC)

StartTry = Callable[..., AbstractContextManager[RuntimeTaskInstance]]


class Supervisor:
    """Stands for the process between a task and Airflow.

    Attributes
    ----------
    variables
        Airflow's Variables.
    states
        Task states by run and by name: `task`, or `task_0` if it is mapped.
    knows_states
        Event that is cleared while Airflow does not return task states.
    """

    def __init__(self) -> None:
        self.variables: dict[str, str] = {}
        self.states: defaultdict[str, dict[str, str | None]] = defaultdict(dict)
        self.knows_states = Event()
        self.knows_states.set()

    def send(self, msg: Any) -> object:
        match msg:
            case comms.GetVariable(key=key) if key in self.variables:
                return comms.VariableResult(key=key, value=self.variables[key])
            case comms.GetVariable():
                return comms.ErrorResponse(error=ErrorType.VARIABLE_NOT_FOUND)
            case comms.PutVariable(key=key, value=str(value)):
                self.variables[key] = value
                return comms.OKResponse(ok=True)
            case comms.DeleteVariable(key=key):
                self.variables.pop(key, None)
                return comms.OKResponse(ok=True)
            case comms.GetVariableKeys(prefix=prefix, limit=limit, offset=offset):
                keys = sorted(key for key in self.variables if key.startswith(prefix or ""))
                return comms.VariableKeysResult(
                    keys=keys[offset : offset + limit], total_entries=len(keys)
                )
            case comms.GetTaskStates(run_ids=[run_id]):
                self.knows_states.wait()
                return comms.TaskStatesResult(task_states=self._find_states(run_id, msg))
            case comms.GetConnection():
                return comms.ErrorResponse(error=ErrorType.CONNECTION_NOT_FOUND)
            case comms.MaskSecret():
                return None
            case _:
                raise NotImplementedError(msg)

    def _find_states(
        self, run_id: str, asked: comms.GetTaskStates
    ) -> dict[str, dict[str, str | None]]:
        states = dict(self.states[run_id])
        if asked.task_ids is not None:
            names = {_name(task_id, asked.map_index) for task_id in asked.task_ids}
            states = {name: state for name, state in states.items() if name in names}
        return {run_id: states} if states else {}


def _name(task_id: str, map_index: int | None) -> str:
    return task_id if map_index is None or map_index < 0 else f"{task_id}_{map_index}"


@contextmanager
def start_try(
    try_number: int = 1,
    *,
    dag_id: str = "shop",
    task_id: str = "run_query",
    run_id: str = "manual__1",
    map_index: int = -1,
    clear_number: int = 0,
    max_tries: int = 3,
    run_start: datetime | None = RUN_START,
    upstream: str | None = None,
    task: BaseOperator | None = None,
    resumes: UUID | None = None,
    scope: bool = True,
    conn_id: str = "polars_cloud",
    raises: type[BaseException] | None = None,
    match: str | None = None,
) -> Iterator[RuntimeTaskInstance]:
    """Run the body as a try of a task, with the current supervisor.

    A try inside the body of another try stands for a task on another worker.

    Parameters
    ----------
    upstream
        Id of the task before this one.
    task
        The operator; by default, one that does nothing.
    resumes
        Id of the deferred try to resume.
    scope
        True to run the body logged in, as below `@authenticate`.
    raises, match
        The error that must end the try.
    """
    from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS

    if task is None:
        with DAG(dag_id, schedule=None):
            task = BaseOperator(task_id=task_id)
            if upstream:
                task.set_upstream(BaseOperator(task_id=upstream))
    ti = RuntimeTaskInstance.model_construct(
        id=resumes or uuid7(),
        dag_id=dag_id,
        task_id=task.task_id,
        run_id=run_id,
        try_number=try_number,
        map_index=map_index,
        task=task,
        start_date=datetime.now(UTC),
        max_tries=max_tries,
    )
    context: Any = ti.get_template_context()
    context["dag_run"] = SimpleNamespace(
        clear_number=clear_number, start_date=run_start, run_after=datetime.now(UTC)
    )
    if resumes:  # not before a context exists, which would be created from it
        ti._ti_context_from_server = SimpleNamespace(next_method="resume")  # type: ignore[assignment]
    states, name = SUPERVISOR_COMMS.states[run_id], _name(task.task_id, map_index)  # type: ignore[attr-defined]
    states[name] = "running"
    with pytest.raises(raises, match=match) if raises else nullcontext():
        try:
            with set_current_context(context), ExitStack() as stack:
                if scope:
                    stack.enter_context(logged_in(conn_id))
                yield ti
            states[name] = "success"
        except TaskKilled:
            raise  # the test has set the state of a killed task
        except TaskDeferred:
            states[name] = "deferred"
            raise
        except BaseException:
            states[name] = "failed"
            raise


@contextmanager
def logged_in(conn_id: str) -> Iterator[TaskScope]:
    """Run the body as below `@authenticate`."""
    with task_scope(conn_id) as scope:
        scope.begin()
        yield scope


class FrozenTry(Generic[T]):
    """A try whose worker is frozen, until `wake`.

    Others cannot tell a worker that never wakes up from one that got SIGKILL: no code at the end
    of the try runs, not even a `finally`.

    Attributes
    ----------
    result
        Value that the body yielded when its worker froze.
    """

    def __init__(self, body: Callable[[], Iterator[T]], conn_id: str) -> None:
        self._body = body
        self._conn_id = conn_id
        self._context = get_current_context()
        self._stood_still = Future[T]()
        self._woken = Future[None]()
        self._thread = Thread(target=self._run, name="frozen-try", daemon=True)
        self._thread.start()
        self.result = self._stood_still.result()

    def wake(self, error: BaseException) -> None:
        """Raise the error where the try is frozen, and wait for the end of the try."""
        with set_current_context(self._context):
            self._woken.set_exception(error)
            self._thread.join()

    def _run(self) -> None:
        try:
            with logged_in(self._conn_id):
                steps: Any = self._body()
                self._stood_still.set_result(next(steps))
                try:
                    self._woken.result()
                except BaseException as error:
                    steps.throw(error)
        except BaseException as error:
            if not self._stood_still.done():
                self._stood_still.set_exception(error)


def freeze(
    body: Callable[[], Iterator[T]],
    try_number: int = 1,
    *,
    conn_id: str = "polars_cloud",
    **options: Any,
) -> FrozenTry[T]:
    """Run the body as a try, and freeze its worker where the body yields."""
    from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS

    with start_try(try_number, scope=False, **options) as ti:
        frozen = FrozenTry(body, conn_id)
    states = SUPERVISOR_COMMS.states[ti.run_id]  # type: ignore[attr-defined]
    states[_name(ti.task_id, ti.map_index)] = "running"
    return frozen


def kill(body: Callable[[], Iterator[T]], try_number: int = 1, **options: Any) -> T:
    """Run the body as a try, kill its worker where it yields, and return the yielded value."""
    return freeze(body, try_number, **options).result


class TriedTask:
    """A `@query_task`, each of whose tries runs on a worker that parses its DAG again.

    Attributes
    ----------
    operator, ti, context
        Those of the latest try.
    """

    def __init__(
        self, function: Callable[..., Any], *, conn_id: str = "polars_cloud", **options: Any
    ) -> None:
        logged_in = authenticate(conn_id=conn_id)(function)
        self._decorated: Any = query_task(task_id="run_query", **options)(logged_in)
        self.operator: Any = None
        self.ti: Any = None
        self.context: Any = None
        self._number = 1

    def run(self, try_number: int = 1, **options: Any) -> Any:
        """Run a try, and return the task's return value."""
        self._number = try_number
        return self._run(lambda context: self.operator.execute(context), **options)

    def resume(self, event: dict[str, Any] | None = None) -> Any:
        """Resume the latest try with its trigger's event, empty by default."""
        return self._resume("resume", {"event": event or {}})

    def resume_without_trigger(self, error: str = "Trigger timeout", **more: Any) -> Any:
        """Resume the latest try although its trigger has not fired."""
        return self._resume("__fail__", {"error": error, **more})

    def _resume(self, next_method: str, next_kwargs: dict[str, Any]) -> Any:
        stored: Any = deserialize(json.loads(json.dumps(serialize(next_kwargs))))
        return self._run(
            lambda context: self.operator.resume_execution(next_method, stored, context),
            resumes=self.ti.id,
        )

    def _run(self, execute: Callable[[Any], Any], **options: Any) -> Any:
        with DAG("shop", schedule=None):
            self.operator = self._decorated().operator
        with start_try(self._number, task=self.operator, scope=False, **options) as self.ti:
            self.context = get_current_context()
            return execute(self.context)


def deferral_of(run: Callable[..., Any], *args: Any, **options: Any) -> TaskDeferred:
    """Run a try that must be deferred."""
    with pytest.raises(TaskDeferred) as raised:
        run(*args, **options)
    return raised.value
