"""Interrupt a task at each of its calls: no query, cluster or entry is left behind."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Thread
from types import ModuleType
from typing import Any, NamedTuple

import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time import comms

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import use_cluster
from polars_remote.cloud import retry, session
from polars_remote.clusters import start_for_run
from polars_remote.ownership import end
from polars_remote.ownership.end import end_orphans
from polars_remote.waiting import deferral
from tests.observed import cluster_statuses, query_statuses
from tests.tries import Supervisor, TriedTask, start_try

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4, "cluster_size": 2}
FILE = "s3://your-bucket/results/one.parquet"
FOR_GOOD = 1_000_000
NO_OUTAGE = 60.0
"""Seconds for which a call is retried if it is interrupted only once."""
QUERY_ENDS, CLUSTER_ENDS = {"Success", "Failed", "Canceled"}, {"Stopped", "Failed"}


class Call(NamedTuple):
    """The task's n-th call of a name, to Airflow or to Polars Cloud."""

    name: str
    number: int


class WorkerDied(BaseException):
    """Raised in all threads of a killed worker at their next call."""


class Worker:
    """A worker that runs a task once.

    Parameters
    ----------
    interrupt
        Called before each call to Airflow. Its exception replaces the call's answer.

    Attributes
    ----------
    calls
        Calls to Airflow, oldest first.
    error
        Exception that ended the task.
    is_dead
        The worker was killed, and makes no further call.
    """

    current = ContextVar["Worker | None"]("worker", default=None)

    def __init__(
        self,
        task: Callable[[], None],
        interrupt: Callable[["Worker", Call], None] = lambda worker, call: None,
    ) -> None:
        self.calls: list[Call] = []
        self.error: BaseException | None = None
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
        try:
            self._task()
        except BaseException as error:
            self.error = error


@pytest.fixture(autouse=True)
def workers_calls(pc: ModuleType, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Route each call of a worker through its `Worker`."""

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
    monkeypatch.setattr(retry, "OUTAGE_SECONDS", 0.1)
    monkeypatch.setattr(end, "IDLE_WAIT_SECONDS", 1.0)
    monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.1)


def submit(ctx: Any) -> Any:
    return pl.LazyFrame({"x": [1]}).remote(ctx).single_node().sink_parquet(FILE)


# What is interrupted


def succeed(_: RunningEmulator) -> None:
    with start_try(), use_cluster(CLUSTER) as ctx:
        submit(ctx).await_result()


def fail_in_mid_query(emulator: RunningEmulator) -> None:
    with start_try(), use_cluster(CLUSTER) as ctx:
        emulator.add_fault("SubmitQuery", "query_hangs")
        submit(ctx)
        raise KeyError


def defer(emulator: RunningEmulator) -> None:
    def function() -> Any:
        with use_cluster(CLUSTER) as ctx:
            emulator.add_fault("SubmitQuery", "query_hangs")
            return submit(ctx)

    TriedTask(function).run()


def start_shared_cluster(_: RunningEmulator) -> None:
    with start_try(scope=False):
        start_for_run(CLUSTER, "polars_cloud")


def fail_after_resuming(_: RunningEmulator) -> None:
    with start_try(2), use_cluster(CLUSTER) as ctx:
        submit(ctx)
        raise KeyError


def fail_before_resuming(_: RunningEmulator) -> None:
    with start_try(2), use_cluster(CLUSTER):
        raise KeyError


def submit_anew(_: RunningEmulator) -> None:
    with start_try(2, clear_number=1), use_cluster(CLUSTER) as ctx:
        submit(ctx).await_result()


def use_the_same_cluster(_: RunningEmulator) -> None:
    with start_try(task_id="next"), use_cluster(CLUSTER, stop=False) as ctx:
        submit(ctx).await_result()


class Scenario(NamedTuple):
    """Code of the interrupted worker.

    Attributes
    ----------
    is_second
        True if an earlier try of the task was killed while its query ran.
    """

    run: Callable[[RunningEmulator], None]
    is_second: bool = False


FIRST = (succeed, fail_in_mid_query, defer, start_shared_cluster)
SECOND = (fail_after_resuming, fail_before_resuming, submit_anew, use_the_same_cluster)
ALL = [*map(Scenario, FIRST), *(Scenario(run, is_second=True) for run in SECOND)]


def name_scenario(scenario: object) -> str | None:
    return scenario.run.__name__ if isinstance(scenario, Scenario) else None


def die_in_mid_query(emulator: RunningEmulator) -> None:
    def run() -> None:
        with start_try(), use_cluster(CLUSTER) as ctx:
            emulator.add_fault("SubmitQuery", "query_hangs")
            submit(ctx)
            worker.is_dead = True
            raise WorkerDied

    worker = Worker(run)
    worker.start()
    worker.join()


class Stage:
    """Run scenarios, each on a new Polars Cloud and a new Airflow."""

    def __init__(self, emulator: RunningEmulator, supervisor: Supervisor) -> None:
        self._emulator = emulator
        self._supervisor = supervisor
        self._journal = 0

    @contextmanager
    def running(
        self,
        scenario: Scenario,
        interrupt: Callable[[Worker, Call], None] = lambda worker, call: None,
        fault: dict[str, Any] | None = None,
    ) -> Iterator[Worker]:
        """Start the scenario; reset everything when the body ends."""
        session._login = session._Login()
        if scenario.is_second:
            die_in_mid_query(self._emulator)
            session._login = session._Login()
        self._journal = len(self._emulator.journal())
        if fault:
            self._emulator.add_fault(**fault)
        worker = Worker(lambda: scenario.run(self._emulator), interrupt)
        worker.start()
        try:
            yield worker
        finally:
            self._emulator.clear_faults()  # releases a stalled worker
            worker.is_dead = True
            worker.join()
            self._emulator.reset()
            self._supervisor.variables.clear()
            self._supervisor.states.clear()

    def record(self, scenario: Scenario) -> tuple[list[Call], list[Call]]:
        """Return the calls to Airflow and those to Polars Cloud of an uninterrupted scenario."""
        with self.running(scenario) as worker:
            worker.join()
            calls = worker.calls, self.list_calls()
        assert all(len(each) > 5 for each in calls)
        return calls

    def list_calls(self) -> list[Call]:
        """Return the scenario's calls to Polars Cloud, oldest first."""
        numbers = Counter[str]()
        calls = []
        for entry in self._emulator.journal()[self._journal :]:
            path = re.sub(r"^/(api/v1/(workspace/[^/]+/(?=.))?|realms/.*/)", "", entry["path"])
            name = f"{entry['method']} {re.sub(r'[0-9a-f-]{36}', '{id}', path)}"
            if "ClientService" in path:
                name = path.rpartition("/")[2]
            numbers[name] += 1
            calls.append(Call(name, numbers[name]))
        return calls

    def sweep(self) -> str:
        """End orphans as another process does; return those that could not be ended."""
        session._login = session._Login()
        states = self._supervisor.states["manual__1"]
        states.update(dict.fromkeys(states, "failed"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(retry, "OUTAGE_SECONDS", NO_OUTAGE)
            left = ", ".join(map(str, end_orphans()))
        return left or self.find_rest()

    def find_rest(self) -> str:
        """Return running queries, live clusters and entries on record."""
        found = {
            "queries": set(query_statuses(self._emulator)) - QUERY_ENDS,
            "clusters": set(cluster_statuses(self._emulator)) - CLUSTER_ENDS,
            "record": list(self._supervisor.variables.values()),
        }
        return ", ".join(f"{name}: {each}" for name, each in found.items() if each)


@pytest.fixture
def stage(emulator: RunningEmulator, supervisor: Supervisor) -> Stage:
    return Stage(emulator, supervisor)


# Calls to Airflow


def refuse(_: Worker) -> None:
    error = comms.ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={"of": "a fault"})
    raise AirflowRuntimeError(error)


def die(worker: Worker) -> None:
    worker.is_dead = True


@pytest.mark.parametrize("interruption", [refuse, die])
@pytest.mark.parametrize("scenario", ALL, ids=name_scenario)
def test_a_call_to_airflow_that_is_interrupted_for_good_leaves_nothing_after_the_sweep(
    stage: Stage, scenario: Scenario, interruption: Callable[[Worker], None]
) -> None:
    def interrupt(worker: Worker, call: Call) -> None:
        if call.name == at.name and call.number >= at.number:
            interruption(worker)

    holes = {}
    for at in stage.record(scenario)[0]:
        with stage.running(scenario, interrupt) as worker:
            worker.join()
            assert at in worker.calls
            if hole := stage.sweep():
                holes[at] = hole
    assert not holes, holes


# Calls to Polars Cloud


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [
        *((each, "connection_reset") for each in ALL),
        (Scenario(fail_in_mid_query), "answer_lost"),
    ],
    ids=name_scenario,
)
def test_a_call_to_polars_cloud_that_fails_for_good_leaves_nothing_after_the_sweep(
    stage: Stage, emulator: RunningEmulator, scenario: Scenario, kind: str
) -> None:
    holes = {}
    for at in stage.record(scenario)[1]:
        fault = {"operation": at.name, "kind": kind, "nth": at.number, "times": FOR_GOOD}
        with stage.running(scenario, fault=fault) as worker:
            worker.join()
            emulator.clear_faults()
            if hole := stage.sweep():
                holes[at] = hole
    assert not holes, holes


@pytest.mark.parametrize("scenario", ALL, ids=name_scenario)
def test_a_worker_that_dies_at_a_call_to_polars_cloud_leaves_nothing_after_the_sweep(
    stage: Stage, scenario: Scenario
) -> None:
    holes = {}
    for at in stage.record(scenario)[1]:
        fault = {"operation": at.name, "kind": "stall", "nth": at.number}
        with stage.running(scenario, fault=fault) as worker:
            # The number of polls varies, so the task may have ended before this poll.
            eventually(lambda: at in stage.list_calls() or worker.has_ended())  # noqa: B023
            worker.is_dead = True
            if hole := stage.sweep():
                holes[at] = hole
    assert not holes, holes


@pytest.mark.parametrize("kind", ["connection_reset", "answer_lost"])
def test_a_call_to_polars_cloud_that_fails_once_changes_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(retry, "OUTAGE_SECONDS", NO_OUTAGE)
    errors, holes = {}, {}
    scenario = Scenario(succeed)
    for at in stage.record(scenario)[1]:
        fault = {"operation": at.name, "kind": kind, "nth": at.number}
        with stage.running(scenario, fault=fault) as worker:
            worker.join()
            if worker.error:
                errors[at] = worker.error
            if hole := stage.find_rest():
                holes[at] = hole
    assert not errors, errors
    assert not holes, holes
