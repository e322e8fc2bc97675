"""`make airflow` runs every DAG under Airflow's scheduler, and stops all its processes."""

import contextlib
import json
import re
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from local_airflow import ROOT
from polars_cloud_emulator.testing import eventually
from standalone import get_token
from tests.eight_dags import KEPT
from tests.failures.deployment import free_ports

LEAVE_THEIR_CLUSTER = {"manifest_reuse", "single_query", "status_check"}
"""DAGs whose cluster only its idle timeout stops."""
READY_IN = 240.0
GREEN_IN = 300.0
STOPPED_IN = 120.0


class Standalone:
    """The running script."""

    def __init__(self, home: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._output = home / "output"
        command = [sys.executable, str(ROOT / "scripts" / "standalone.py")]
        command += ["--home", str(home), "--port", str(port)]
        with self._output.open("w") as output:
            self._script = psutil.Popen(command, stdout=output, stderr=output)
        self._started: set[psutil.Process] = set()

    @property
    def output(self) -> str:
        return self._output.read_text()

    def emulator_url(self) -> str:
        """Return the address of the emulator, which is ready before Airflow starts."""
        return self._match(r"^Emulator: (\S+)$")[1]

    def wait_until_ready(self) -> None:
        self._match(rf"^Airflow runs until Ctrl-C: {self.url}$")

    def migration(self) -> psutil.Process:
        """Return the process of `airflow db migrate`, the first of Airflow's processes."""

        def started() -> psutil.Process | None:
            self._look()
            return next((p for p in self._started if "migrate" in p.cmdline()), None)

        return eventually(started)

    def get(self, url: str, until: Callable[[Any], bool]) -> Any:
        """Poll until the condition holds; return the answer."""
        request = urllib.request.Request(url)
        request.add_header("Authorization", f"Bearer {get_token(self._port)}")
        deadline = time.monotonic() + GREEN_IN
        while True:
            with urllib.request.urlopen(request) as response:
                answer = json.load(response)
            if until(answer):
                return answer
            assert time.monotonic() < deadline, f"{answer}\n{self.output}"
            self._look()
            time.sleep(1)  # polling more often would slow Airflow down

    def stop(self) -> int:
        self._look()
        self._script.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for the script's end; return its exit code."""
        exit_code: int = self._script.wait(STOPPED_IN)
        return exit_code

    def survivors(self) -> list[psutil.Process]:
        """Return all its processes that still run."""
        _, running = psutil.wait_procs(self._started, timeout=1)
        return list(running)

    def close(self) -> None:
        for process in (self._script, *self._started):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._script.wait()

    def _look(self) -> None:
        self._started.update(self._script.children(recursive=True))

    def _match(self, pattern: str) -> re.Match[str]:
        def match() -> re.Match[str] | None:
            assert self._script.poll() is None, self.output
            return re.search(pattern, self.output, re.MULTILINE)

        found = eventually(match, READY_IN)
        assert found
        return found


@contextlib.contextmanager
def standalone(home: Path) -> Iterator[Standalone]:
    running = Standalone(home, free_ports(1))
    try:
        yield running
    finally:
        running.close()


@dataclass(frozen=True)
class Session:
    """Observations of one Airflow from its start to its stop."""

    runs: list[dict[str, Any]]
    task_instances: list[dict[str, Any]]
    emulator: dict[str, Any]
    exit_code: int
    survivors: list[psutil.Process]
    logs: Path

    def log(self, task: dict[str, Any]) -> str:
        """Return the log of a task, of all tries."""
        folder = self.logs / f"dag_id={task['dag_id']}" / f"run_id={task['dag_run_id']}"
        paths = sorted(folder.glob(f"task_id={task['task_id']}/**/attempt=*.log"))
        return "".join(path.read_text() for path in paths)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    home = tmp_path_factory.mktemp("airflow")
    with standalone(home) as airflow:
        airflow.wait_until_ready()
        runs = airflow.get(
            f"{airflow.url}/api/v2/dags/~/dagRuns",
            until=lambda answer: (
                {run["dag_id"] for run in answer["dag_runs"] if run["end_date"]} >= KEPT
            ),
        )
        task_instances = airflow.get(
            f"{airflow.url}/api/v2/dags/~/dagRuns/~/taskInstances?limit=100",
            until=lambda answer: len(answer["task_instances"]) == answer["total_entries"],
        )
        emulator = airflow.get(
            f"{airflow.emulator_url()}/_emulator/state",
            until=lambda state: all(query["ended_at"] for query in state["queries"]),
        )
        yield Session(
            runs["dag_runs"],
            task_instances["task_instances"],
            emulator,
            airflow.stop(),
            airflow.survivors(),
            home / "logs",
        )


def test_every_dag_runs_by_itself_and_succeeds(session: Session) -> None:
    states = {run["dag_id"]: run["state"] for run in session.runs}
    assert {dag_id: states[dag_id] for dag_id in KEPT} == dict.fromkeys(KEPT, "success")


def test_every_task_succeeds_at_its_first_try(session: Session) -> None:
    for task in session.task_instances:
        if task["dag_id"] not in KEPT:
            continue
        outcome = (task["state"], task["try_number"])
        assert outcome == ("success", 1), f"{task}\n{session.log(task)[-6000:]}"


def test_every_query_succeeds(session: Session) -> None:
    assert session.emulator["queries"]
    assert {query["status"] for query in session.emulator["queries"]} == {"Success"}


def test_only_clusters_left_to_their_idle_timeout_are_running(session: Session) -> None:
    running = {
        cluster["id"] for cluster in session.emulator["clusters"] if not cluster["stopped_at"]
    }
    results = {
        uri
        for query in session.emulator["queries"]
        for uri in query["destinations"]
        if query["cluster_id"] in running and query["labels"][0].removeprefix("dag=") in KEPT
    }
    assert results == {
        f"s3://your-bucket/results/{dag}.parquet" for dag in LEAVE_THEIR_CLUSTER & KEPT
    }


def test_the_emulator_knows_every_call(session: Session) -> None:
    assert session.emulator["unmatched"] == []


def test_stopping_leaves_no_process(session: Session) -> None:
    assert (session.exit_code, session.survivors) == (0, [])


def test_stopping_during_the_start_also_ends_hanging_processes(tmp_path: Path) -> None:
    with standalone(tmp_path) as airflow:
        airflow.migration().suspend()
        assert (airflow.stop(), airflow.survivors()) == (0, [])


def test_a_component_that_exits_by_itself_stops_the_others(tmp_path: Path) -> None:
    with standalone(tmp_path) as airflow:
        airflow.migration().kill()
        assert (airflow.wait(), airflow.survivors()) == (1, [])
        assert airflow.output.endswith("'airflow db migrate' failed: Airflow's log shows why\n")


def test_a_taken_port_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        airflow = Standalone(tmp_path, port)
        assert airflow.wait() == 1
    assert re.fullmatch(rf"Airflow cannot listen on port {port} .*\n", airflow.output)
