"""Whatever call a task is interrupted at: once it has ended, nothing of it runs or is on record."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Thread
from types import ModuleType
from typing import Any, NamedTuple

import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType, TaskDeferred
from airflow.sdk.execution_time import comms

from include.polars_remote import use_cluster
from include.polars_remote.cloud import retry, session
from include.polars_remote.clusters import start_for_run
from include.polars_remote.ownership import end
from include.polars_remote.ownership.end import end_orphans
from include.polars_remote.waiting import deferral
from polars_cloud_emulator.testing import RunningEmulator, eventually
from tests.observed import cluster_statuses, query_statuses
from tests.tries import Supervisor, TriedTask, start_try

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}
FILE = "s3://your-bucket/results/one.parquet"
FOR_GOOD = 1_000_000
QUERY_ENDS, CLUSTER_ENDS = {"Success", "Failed", "Canceled"}, {"Stopped", "Failed"}

Task = Callable[[RunningEmulator, Supervisor], None]


class Call(NamedTuple):
    """A call to Airflow or to Polars Cloud, the task's n-th of its name."""

    name: str
    number: int


class WorkerDied(BaseException):
    """Unwinds the worker's threads; none of them reaches Airflow or Polars Cloud any more."""


class Worker:
    """A worker, on which a task runs once.

    Parameters
    ----------
    interrupt
        Called before each call to Airflow. What it raises is the call's answer.

    Attributes
    ----------
    calls
        To Airflow, oldest first.
    is_dead
        The worker was killed: none of its calls is made any more.
    """

    current = ContextVar["Worker | None"]("worker", default=None)

    def __init__(
        self,
        task: Callable[[], None],
        interrupt: Callable[["Worker", Call], None] = lambda worker, call: None,
    ) -> None:
        self.calls: list[Call] = []
        self.is_dead = False
        self._task = task
        self._interrupt = interrupt
        self._numbers = Counter[str]()
        self._thread = Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def call_airflow(self, name: str) -> None:
        """Count a call to Airflow that is about to be made."""
        self.check_life()
        self._numbers[name] += 1
        call = Call(name, self._numbers[name])
        self.calls.append(call)
        self._interrupt(self, call)
        self.check_life()

    def check_life(self) -> None:
        if self.is_dead:
            raise WorkerDied

    def _run(self) -> None:
        self.current.set(self)
        with suppress(Exception, TaskDeferred, WorkerDied):
            self._task()


@pytest.fixture(autouse=True)
def workers_calls(pc: ModuleType, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of a worker passes the worker first."""

    def send(msg: Any) -> object:
        if worker := Worker.current.get():
            worker.call_airflow(type(msg).__name__)
        return airflow(msg)

    def in_thread(function: Callable[[], Any], timeout: float | None = None) -> Any:
        if worker := Worker.current.get():
            worker.check_life()
        return call(function, timeout)

    airflow, call = supervisor.send, retry.in_thread
    monkeypatch.setattr(supervisor, "send", send)
    monkeypatch.setattr(retry, "in_thread", in_thread)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "OUTAGE_SECONDS", 0.3)
    monkeypatch.setattr(end, "WIND_UP_SECONDS", 1.0)
    monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.1)


def submit(ctx: Any) -> Any:
    return pl.LazyFrame({"x": [1]}).remote(ctx).single_node().sink_parquet(FILE)


def die_in_mid_query(emulator: RunningEmulator, **options: Any) -> None:
    """A try whose worker is killed."""

    def run() -> None:
        with start_try(**options), use_cluster(CLUSTER) as ctx:
            emulator.add_fault("SubmitQuery", "query_hangs")
            submit(ctx)
            first.is_dead = True
            raise WorkerDied

    first = Worker(run)
    first.start()
    first.join()


def succeed(_: RunningEmulator, __: Supervisor) -> None:
    with start_try(), use_cluster(CLUSTER) as ctx:
        submit(ctx).await_result()


def fail_in_mid_query(emulator: RunningEmulator, _: Supervisor) -> None:
    with start_try(), use_cluster(CLUSTER) as ctx:
        emulator.add_fault("SubmitQuery", "query_hangs")
        submit(ctx)
        raise KeyError


def fail_after_a_resumption(emulator: RunningEmulator, _: Supervisor) -> None:
    die_in_mid_query(emulator)
    with start_try(2), use_cluster(CLUSTER) as ctx:
        submit(ctx)
        raise KeyError


def fail_before_a_resumption(emulator: RunningEmulator, _: Supervisor) -> None:
    die_in_mid_query(emulator)
    with start_try(2), use_cluster(CLUSTER):
        raise KeyError


def submit_anew_when_cleared(emulator: RunningEmulator, _: Supervisor) -> None:
    die_in_mid_query(emulator)
    with start_try(2, clear_number=1), use_cluster(CLUSTER) as ctx:
        submit(ctx).await_result()


def use_the_cluster_of_a_killed_task(emulator: RunningEmulator, supervisor: Supervisor) -> None:
    die_in_mid_query(emulator, task_id="other")
    supervisor.states["manual__1"]["other"] = "failed"
    with start_try(), use_cluster(CLUSTER, stop=False) as ctx:
        submit(ctx).await_result()


def defer(emulator: RunningEmulator, _: Supervisor) -> None:
    def function() -> Any:
        with use_cluster(CLUSTER) as ctx:
            emulator.add_fault("SubmitQuery", "query_hangs")
            return submit(ctx)

    TriedTask(function).run()


def start_shared_cluster(_: RunningEmulator, __: Supervisor) -> None:
    with start_try(scope=False):
        start_for_run(CLUSTER, "polars_cloud")


TASKS = pytest.mark.parametrize(
    "task",
    [
        succeed,
        fail_in_mid_query,
        fail_after_a_resumption,
        fail_before_a_resumption,
        submit_anew_when_cleared,
        use_the_cluster_of_a_killed_task,
        defer,
        start_shared_cluster,
    ],
)


@contextmanager
def running(worker: Worker, emulator: RunningEmulator, supervisor: Supervisor) -> Iterator[None]:
    """Start the worker; what it left is gone when the body ends."""
    session._login = session._Login()
    worker.start()
    try:
        yield
    finally:
        emulator.clear_faults()  # lets go a worker that stands still
        worker.is_dead = True
        worker.join()
        emulator.reset()
        supervisor.variables.clear()
        supervisor.states.clear()


def sweep(emulator: RunningEmulator, supervisor: Supervisor) -> str:
    """End the orphans of a task that has ended, as another process; what is wrong afterwards."""
    session._login = session._Login()
    for task in supervisor.states["manual__1"]:
        supervisor.states["manual__1"][task] = "failed"
    left = end_orphans()
    queries = [each for each in query_statuses(emulator) if each not in QUERY_ENDS]
    clusters = [each for each in cluster_statuses(emulator) if each not in CLUSTER_ENDS]
    found = {
        "queries": queries,
        "clusters": clusters,
        "record": list(supervisor.variables.values()),
        "left": list(map(str, left)),
    }
    return ", ".join(f"{name}: {each}" for name, each in found.items() if each)


def list_calls(emulator: RunningEmulator) -> list[Call]:
    """The calls to Polars Cloud, oldest first."""
    numbers = Counter[str]()
    calls = []
    for entry in emulator.journal():
        path = re.sub(r"^/(api/v1/(workspace/[^/]+/(?=.))?|realms/.*/)", "", entry["path"])
        name = re.sub(r"[0-9a-f-]{36}", "{id}", path)
        name = name.rpartition("/")[2] if "ClientService" in name else f"{entry['method']} {name}"
        numbers[name] += 1
        calls.append(Call(name, numbers[name]))
    return calls


def record_calls(
    task: Task, emulator: RunningEmulator, supervisor: Supervisor
) -> tuple[list[Call], list[Call]]:
    """The calls to Airflow and those to Polars Cloud of a task that nothing interrupts."""
    emulator.reset()
    worker = Worker(lambda: task(emulator, supervisor))
    with running(worker, emulator, supervisor):
        worker.join()
        return worker.calls, list_calls(emulator)


# Airflow


def fail_for_good(_: Worker) -> None:
    error = comms.ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={"of": "a fault"})
    raise AirflowRuntimeError(error)


def die(worker: Worker) -> None:
    worker.is_dead = True


@TASKS
@pytest.mark.parametrize("interruption", [fail_for_good, die])
def test_nothing_is_left_of_a_task_that_is_interrupted_at_a_call_to_airflow(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    task: Task,
    interruption: Callable[[Worker], None],
) -> None:
    def interrupt(worker: Worker, call: Call) -> None:
        if call.name == at.name and call.number >= at.number:
            interruption(worker)

    calls, _ = record_calls(task, emulator, supervisor)
    assert len(calls) > 5
    holes = {}
    for at in calls:
        worker = Worker(lambda: task(emulator, supervisor), interrupt)
        with running(worker, emulator, supervisor):
            worker.join()
            assert at in worker.calls
            if hole := sweep(emulator, supervisor):
                holes[at] = hole
    assert not holes, holes


# Polars Cloud


@TASKS
@pytest.mark.parametrize("kind", ["connection_reset", "answer_lost"])
def test_nothing_is_left_of_a_task_of_which_a_call_to_polars_cloud_fails_for_good(
    emulator: RunningEmulator, supervisor: Supervisor, task: Task, kind: str
) -> None:
    _, calls = record_calls(task, emulator, supervisor)
    assert len(calls) > 5
    holes = {}
    for at in calls:
        emulator.add_fault(at.name, kind, nth=at.number, times=FOR_GOOD)
        worker = Worker(lambda: task(emulator, supervisor))
        with running(worker, emulator, supervisor):
            worker.join()
            emulator.clear_faults()
            if hole := sweep(emulator, supervisor):
                holes[at] = hole
    assert not holes, holes


@TASKS
def test_nothing_is_left_of_a_task_whose_worker_dies_at_a_call_to_polars_cloud(
    emulator: RunningEmulator, supervisor: Supervisor, task: Task
) -> None:
    def is_there() -> bool:
        return at in list_calls(emulator) or worker.has_ended()

    _, calls = record_calls(task, emulator, supervisor)
    holes = {}
    for at in calls:
        emulator.add_fault(at.name, "stall", nth=at.number)
        worker = Worker(lambda: task(emulator, supervisor))
        with running(worker, emulator, supervisor):
            eventually(is_there)
            worker.is_dead = True
            if hole := sweep(emulator, supervisor):
                holes[at] = hole
    assert not holes, holes
