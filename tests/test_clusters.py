"""`include/clusters.py`: no cluster outlives its work, and no clean-up hides an error."""

import logging
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from include.clusters import running_cluster, start_cluster, stop_cluster
from polars_cloud_emulator.testing import RunningEmulator

SPEC = {"cpus": 2, "memory": 4}


@pytest.fixture
def ctx(pc: ModuleType) -> Any:
    return pc.ComputeContext(workspace="playground", **SPEC)


def statuses(emulator: RunningEmulator) -> list[str]:
    return [cluster["status"] for cluster in emulator.state()["clusters"]]


def test_the_cluster_runs_for_the_body_and_no_longer(ctx: Any, emulator: RunningEmulator) -> None:
    with running_cluster(ctx):
        assert statuses(emulator) == ["Idle"]
    assert statuses(emulator) == ["Stopped"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_the_bodys_own_error_is_what_the_task_sees(
    ctx: Any, emulator: RunningEmulator, error: BaseException
) -> None:
    with pytest.raises(type(error)) as raised, running_cluster(ctx):
        raise error
    assert raised.value is error
    assert statuses(emulator) == ["Stopped"]


def test_the_bodys_own_error_survives_a_stop_that_fails(
    ctx: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    def body() -> None:
        emulator.reset()  # stopping a cluster that nobody knows is an error
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), running_cluster(ctx):
        body()
    assert f"Cluster {ctx._compute_id} could not be stopped" in caplog.text


def test_a_stop_that_fails_after_a_good_body_is_an_error(
    ctx: Any, emulator: RunningEmulator
) -> None:
    with pytest.raises(Exception, match="does not exist"), running_cluster(ctx):
        emulator.reset()


def test_a_cluster_that_was_stopped_in_the_meantime_is_no_error(
    ctx: Any, pc: ModuleType, emulator: RunningEmulator
) -> None:
    with running_cluster(ctx):
        pc.ComputeContext.connect(ctx._compute_id, workspace="playground").stop()
    assert statuses(emulator) == ["Stopped"]


def test_a_spec_that_is_refused_starts_nothing(emulator: RunningEmulator) -> None:
    with pytest.raises(ValueError, match="idle_timeout_mins must be at least 10"):
        start_cluster.function({**SPEC, "idle_timeout_mins": 5})
    assert statuses(emulator) == []


def test_the_stop_task_stops_what_the_start_task_started_and_nothing_else(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    first, second = (start_cluster.function(SPEC) for _ in range(2))
    stop_cluster.function(first)
    states = {cluster["id"]: cluster["status"] for cluster in emulator.state()["clusters"]}
    assert states == {first: "Stopped", second: "Idle"}


def test_the_stop_task_is_quiet_when_nothing_is_running(
    pc: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    cluster_id = start_cluster.function(SPEC)
    stop_cluster.function(cluster_id)
    with caplog.at_level(logging.INFO, "include.clusters"):
        stop_cluster.function(cluster_id)
    assert "nothing to stop" in caplog.text


def test_the_stop_task_is_not_quiet_about_a_service_that_does_not_know_the_cluster(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    cluster_id = start_cluster.function(SPEC)
    emulator.reset()
    with pytest.raises(Exception, match="does not exist"):
        stop_cluster.function(cluster_id)


STOP_AFTER_THE_SERVICE_HAS_GONE = """
import inspect
import os

from include.clusters import start_cluster, stop_cluster
from polars_cloud_emulator.testing import running_emulator

with running_emulator() as emulator:
    os.environ |= emulator.environment
    cluster_id = start_cluster.function({"cpus": 2, "memory": 4})
inspect.unwrap(stop_cluster.function)(cluster_id)  # logged in, as it was above
"""


def test_the_stop_task_is_not_quiet_about_a_service_that_cannot_be_reached() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", STOP_AFTER_THE_SERVICE_HAS_GONE],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1
    assert "RuntimeError: Error calling REST endpoint" in ran.stderr
