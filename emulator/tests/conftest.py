"""Fixtures of the emulator's tests: the real client in this process and in others."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from emulator.tests.blocking_query import BlockingQuery
from emulator.tests.command_line import Served, command
from emulator.tests.raw_calls import rest_client
from emulator.tests.states import StoppedClock, new_state, spec
from polars_cloud_emulator.env_file import read_env_file
from polars_cloud_emulator.model.clusters import Cluster
from polars_cloud_emulator.model.state import State
from polars_cloud_emulator.server import Emulator
from polars_cloud_emulator.testing import RunningEmulator

LOG_IN = """
import os
import polars as pl
import polars_cloud as pc

pc.authenticate(
    client_id=os.environ["POLARS_CLOUD_CLIENT_ID"],
    client_secret=os.environ["POLARS_CLOUD_CLIENT_SECRET"],
    interactive=False,
)
"""


@pytest.fixture(autouse=True)
def _bounded_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a timeout for waits of the client, which would wait for a year."""
    monkeypatch.setenv("POLARS_TIMEOUT_MS", "60000")


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock()


@pytest.fixture
def state(clock: StoppedClock) -> State:
    """A state without an emulator."""
    return new_state(clock)


@pytest.fixture
def cluster(state: State) -> Cluster:
    return state.clusters.start(spec())


@pytest.fixture
def start_cluster(pc: ModuleType) -> Callable[..., Any]:
    """Start a cluster, and return its ``ComputeContext``."""

    def start(**specs: Any) -> Any:
        context = pc.ComputeContext(workspace="playground", cpus=2, memory=4, **specs)
        context.start()
        return context

    return start


@pytest.fixture
def rest(emulator: RunningEmulator) -> Iterator[httpx.Client]:
    with rest_client(emulator.environment) as client:
        yield client


@pytest.fixture
def background(emulator: RunningEmulator) -> Iterator[Executor]:
    """Threads for calls that wait."""
    with ThreadPoolExecutor() as executor:
        yield executor
        # Also ends the calls of a failed test that still wait.
        emulator.reset()


@pytest.fixture
def blocking(tmp_path: Path) -> BlockingQuery:
    return BlockingQuery(tmp_path / "blocking")


@pytest.fixture
def emulator_here() -> Iterator[Callable[..., RunningEmulator]]:
    """Start an emulator in this process, so that the test can set its clock."""
    emulators: list[Emulator] = []

    def start(**options: Any) -> RunningEmulator:
        emulators.append(Emulator(**options).__enter__())
        return RunningEmulator(emulators[-1].environment, os.getpid())

    yield start
    for emulator in emulators:
        emulator.__exit__(None, None, None)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as started:

        def start(*options: object) -> Served:
            env_file = tmp_path / "env"
            process = subprocess.Popen(
                command("--env-file", env_file, *options),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.enter_context(process)
            started.callback(process.kill)
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]
            served = Served(read_env_file(env_file), process.pid)
            object.__setattr__(served, "process", process)
            shell = f"set -a; . {env_file}; set +a"
            ready = f"Polars Cloud emulator ready; in another shell: {shell}"
            assert lines == [f"{ready}\n", f"Its page: {served.rest_url}\n"]
            return served

        yield start


@pytest.fixture
def run_client() -> Callable[[Mapping[str, str], str], str]:
    """Run code after a login in another process, and return its output."""

    def run(environment: Mapping[str, str], code: str) -> str:
        command = [sys.executable, "-c", LOG_IN + code]
        ran = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    return run
