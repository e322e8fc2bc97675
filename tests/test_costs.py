"""`costs.py`: what a run's use of a cluster cost."""

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from types import ModuleType
from typing import Any
from uuid import uuid4

import polars as pl
import pytest

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import use_cluster
from polars_remote.clusters import start_for_run, stop_for_run
from polars_remote.ownership import costs
from polars_remote.ownership.costs import get_share
from polars_remote.ownership.end import end_orphans
from tests.observed import cluster_statuses, entries
from tests.tries import StartTry, Supervisor, kill

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4, "cluster_size": 3}
ONE_ROW = pl.LazyFrame({"x": [1]})
SECOND = 1 / 60
VCPUS = 6


class Run:
    """A run with a shared cluster."""

    def __init__(self, supervisor: Supervisor, start_try: StartTry, run_id: str) -> None:
        self.run_id = run_id
        self._start_try = start_try
        supervisor.states[run_id] |= {"run_query": None, "stop_cluster": None}
        self._states = supervisor.states[run_id]

    def start_cluster(self) -> None:
        with self._start_try(task_id="start_cluster", run_id=self.run_id, scope=False):
            start_for_run(CLUSTER, "polars_cloud")

    def stop_cluster(self) -> list[dict[str, Any]]:
        with self._start_try(task_id="stop_cluster", run_id=self.run_id, scope=False):
            stopped = stop_for_run(CLUSTER, "polars_cloud", "start_cluster")
        self._states["stop_cluster"] = "success"
        assert json.loads(json.dumps(stopped)) == stopped
        return stopped

    def query(self) -> None:
        with self._start_try(run_id=self.run_id), use_cluster(CLUSTER) as ctx:
            ONE_ROW.remote(ctx).single_node().execute()

    def leave(self) -> None:
        """End the run without its teardown."""
        self._states |= {"run_query": "failed", "stop_cluster": "failed"}


@pytest.fixture
def run(pc: ModuleType, supervisor: Supervisor, start_try: StartTry) -> Run:
    return Run(supervisor, start_try, "manual__1")


@pytest.fixture
def other_run(pc: ModuleType, supervisor: Supervisor, start_try: StartTry) -> Run:
    return Run(supervisor, start_try, "manual__2")


def billed(emulator: RunningEmulator) -> list[float]:
    """Return the billed minutes of each cluster in the emulator, oldest first."""
    return [each["billed_seconds"] / 60 for each in emulator.state()["clusters"]]


def idle_out(emulator: RunningEmulator) -> None:
    emulator.advance_clock(timedelta(minutes=61))
    eventually(lambda: set(cluster_statuses(emulator)) == {"Stopped"})


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for each in caplog.records if "Cost of" in (text := each.getMessage())]


def minutes(found: list[dict[str, Any]]) -> float:
    return sum(each["minutes"] for each in found)


def test_the_cost_of_a_shared_cluster_is_the_emulators_bill(
    run: Run,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run.start_cluster()
    run.query()
    emulator.advance_clock(timedelta(minutes=7))
    [cost] = run.stop_cluster()
    [cluster] = emulator.state()["clusters"]
    assert cost["cluster"] == cluster["id"]
    assert cost["minutes"] == pytest.approx(cluster["billed_seconds"] / 60, abs=0.001)
    assert (cost["nodes"], cost["vcpus"], cost["remark"]) == (3, VCPUS, "")
    assert cost["vcpu_hours"] == pytest.approx(cost["minutes"] * VCPUS / 60, rel=0.001)
    for name, field in {"started": "requested_at", "stopped": "stopped_at"}.items():
        difference = datetime.fromisoformat(cost[name]) - datetime.fromisoformat(cluster[field])
        assert abs(difference) < timedelta(seconds=0.01)
    [line] = logged(caplog)
    assert f"3 nodes, 6 vCPUs, {cost['minutes']} min, {cost['vcpu_hours']} vCPU-hours" in line
    assert cost["money"] is None
    assert supervisor.variables == {}


@pytest.mark.usefixtures("ti", "pc")
def test_the_cost_of_a_block_is_logged_when_its_cluster_has_stopped(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    with use_cluster(CLUSTER) as ctx:
        ONE_ROW.remote(ctx).single_node().execute()
    [bill] = billed(emulator)
    [line] = logged(caplog)
    logged_use = float(line.partition("vCPUs, ")[2].split()[0])
    assert logged_use == pytest.approx(bill, abs=0.001)


@pytest.mark.usefixtures("ti", "pc")
def test_a_block_without_a_query_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with use_cluster(CLUSTER):
        pass
    assert logged(caplog) == []


@pytest.mark.usefixtures("ti", "pc")
def test_a_cluster_that_is_left_to_its_idle_timeout_is_logged_from_the_record(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    with use_cluster(CLUSTER, stop=False) as ctx:
        ONE_ROW.remote(ctx).single_node().execute()
        calls = len(emulator.journal())
    assert len(emulator.journal()) == calls
    [line] = logged(caplog)
    assert line.endswith("(so far: the cluster is left to its idle timeout)")
    assert "3 nodes, 6 vCPUs" in line
    logged_use = float(line.partition("vCPUs, ")[2].split()[0])
    assert logged_use == pytest.approx(billed(emulator)[0], abs=2 * SECOND)


def test_a_price_gives_the_money(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(costs, "PRICE", 0.5)
    run.start_cluster()
    [cost] = run.stop_cluster()
    assert cost["money"] == pytest.approx(cost["vcpu_hours"] / 2, abs=1e-6)
    assert f"{cost['money']} at 0.5 per vCPU-hour" in logged(caplog)[0]


def test_runs_that_share_a_cluster_share_its_bill(
    run: Run,
    other_run: Run,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The runs use the emulator's clock.
    ahead = 0.0
    real = costs.time.time

    def advance(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds
        emulator.advance_clock(timedelta(seconds=seconds))

    monkeypatch.setattr("time.time", lambda: real() + ahead)
    run.start_cluster()
    advance(60)
    other_run.start_cluster()
    advance(120)
    first = run.stop_cluster()
    assert len(entries(supervisor, "cluster")) == 2
    advance(30)
    second = other_run.stop_cluster()
    assert minutes(first) == pytest.approx(1 + 2 / 2, abs=5 * SECOND)
    assert minutes(second) == pytest.approx(2 / 2 + 0.5, abs=5 * SECOND)
    assert minutes(first) + minutes(second) == pytest.approx(sum(billed(emulator)), abs=SECOND)
    assert first[0]["stopped"] is None
    assert first[0]["remark"] == "shared with other runs; so far: the cluster is idle"
    assert second[0]["remark"] == "shared with other runs"
    assert supervisor.variables == {}


def test_an_idle_timeout_ends_the_bill(run: Run, emulator: RunningEmulator) -> None:
    run.start_cluster()
    idle_out(emulator)
    emulator.advance_clock(timedelta(minutes=30))
    cost = run.stop_cluster()
    assert minutes(cost) == pytest.approx(billed(emulator)[0], abs=0.001)
    assert minutes(cost) < 62


def test_a_cluster_that_a_task_started_in_place_of_the_runs_own_counts_too(
    run: Run, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    run.start_cluster()
    idle_out(emulator)
    run.query()
    idle_out(emulator)
    run.query()
    assert cluster_statuses(emulator) == ["Stopped", "Stopped", "Idle"]
    found = run.stop_cluster()
    assert [each["minutes"] for each in found] == pytest.approx(billed(emulator), abs=0.001)
    assert supervisor.variables == {}


def test_the_sweep_logs_the_cost_of_a_run_that_was_killed(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.start_cluster()
    run.leave()
    assert end_orphans() == []
    [line] = logged(caplog)
    assert "in run manual__1 of shop: 3 nodes" in line
    assert run.stop_cluster() == []


def test_a_run_that_was_killed_and_the_one_that_ends_it_share_the_bill(
    run: Run, other_run: Run, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    run.start_cluster()
    run.leave()
    other_run.start_cluster()
    other_run.stop_cluster()
    lines = logged(caplog)
    assert len(lines) == 2
    total = sum(float(line.partition("vCPUs, ")[2].split()[0]) for line in lines)
    assert total == pytest.approx(billed(emulator)[0], abs=SECOND)


def test_the_sweep_logs_the_cost_of_a_killed_block(
    pc: ModuleType,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER) as ctx:
            emulator.add_fault("SubmitQuery", "query_hangs")
            ONE_ROW.remote(ctx).single_node().execute(blocking=False)
            yield

    kill(body)
    supervisor.states["manual__1"]["run_query"] = "failed"
    emulator.advance_clock(timedelta(minutes=5))
    assert end_orphans() == []
    logged_use = float(logged(caplog)[0].partition("vCPUs, ")[2].split()[0])
    assert logged_use == pytest.approx(billed(emulator)[0], abs=0.001)


def test_a_cluster_that_polars_cloud_has_forgotten_says_so_and_fails_nothing(
    run: Run, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    run.start_cluster()
    [(key, value)] = supervisor.variables.items()
    unknown = {"clusters": {str(uuid4()): 0.0}}
    supervisor.variables[key] = json.dumps(json.loads(value) | unknown)
    [cost] = run.stop_cluster()
    assert cost["minutes"] is None
    assert cost["remark"].startswith("not known: ")
    assert cost["remark"] in logged(caplog)[0]


def test_a_stop_that_is_refused_leaves_the_cost_unknown(
    run: Run, emulator: RunningEmulator
) -> None:
    run.start_cluster()
    emulator.add_fault("POST compute/{id}/stop", "http_error", status=403, message="for good")
    [cost] = run.stop_cluster()
    assert cost["minutes"] is None
    assert cost["remark"] == "not known: the run's use of the cluster could not be ended"


@pytest.mark.parametrize(
    ("mine", "others", "takes_rest", "seconds"),
    [
        ([(0, 100)], [], True, 90),
        ([(0, 50)], [], False, 40),
        ([(0, 50)], [], True, 90),
        ([(50, 100)], [], True, 50),
        ([(50, 60)], [], True, 50),
        ([(0, 100)], [[(40, 60)]], True, 80),
        ([(0, 50)], [[(30, 100)]], False, 30),
        ([(30, 100)], [[(0, 50)]], True, 60),
        ([(0, 100)], [[(40, 60)], [(40, 60)]], True, 70 + 20 / 3),
        ([(0, 20), (15, 30)], [], False, 20),
        ([(0, 20)], [[(20, 30), (25, 40)]], False, 10),
        ([(200, 300)], [], True, 0),
    ],
)
def test_each_moment_is_divided_by_the_runs_that_use_the_cluster(
    mine: list[tuple[float, float]],
    others: list[list[tuple[float, float]]],
    takes_rest: bool,
    seconds: float,
) -> None:
    share = get_share(mine, others, 10, 100, takes_rest=takes_rest)
    assert share == pytest.approx(seconds)
