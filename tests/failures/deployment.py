"""A real Airflow with scheduler, DAGs with short delays, and an emulator that can be stopped."""

import contextlib
import functools
import json
import os
import random
import re
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil

from local_airflow import ROOT, use_emulator
from polars_cloud_emulator.env_file import read_env_file
from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote.compat.versions import VERSION
from standalone import airflow, get_token, health, settings
from tests.eight_dags import DELETED

T = TypeVar("T")

TESTS = Path(__file__).parent
OUTAGE = 20.0
"""POLARS_CLOUD_OUTAGE of the DAGs, in seconds."""
READY_IN = 240.0
API_SERVER = "api-server"
SCHEDULER = "scheduler --skip-serve-logs"
TRIGGERER = "triggerer --skip-serve-logs"
DAG_PROCESSOR = "dag-processor"
TASK_PROCESS = r"airflow worker -- [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
TASK_ENDS = {"success", "failed", "skipped", "upstream_failed", "removed"}

TASK_INSTANCES = "task_instance"
"""Table of the tasks of all runs, each with its latest try."""
if VERSION >= (3, 4):
    TASK_INSTANCES = "(SELECT *, region_index AS map_index FROM task_instance WHERE working_set)"

OVERRIDES = {
    '"retries": 2': '"retries": 1',
    'schedule="@daily"': "schedule=None",
    'schedule=CronDataIntervalTimetable("@daily", timezone="UTC")': "schedule=None",
    '"retry_delay": timedelta(minutes=1)': '"retry_delay": timedelta(seconds=1)',
}
"""Changes to the DAG files: no schedule, one retry, and a short retry delay."""

VARIANTS = {
    # By name: the DAG, and changes to its source.
    "status_check_out_of_time": (
        "status_check",
        {"execution_timeout=timedelta(minutes=30)": "execution_timeout=timedelta(seconds=8)"},
    ),
    "context_manager_shutdown_out_of_time": (
        "context_manager_shutdown",
        {"execution_timeout=timedelta(minutes=30)": "execution_timeout=timedelta(seconds=8)"},
    ),
    "manual_shutdown_out_of_time": (
        "manual_shutdown",
        {"execution_timeout=timedelta(minutes=30)": "execution_timeout=timedelta(seconds=8)"},
    ),
    "manual_shutdown_run_out_of_time": (
        "manual_shutdown",
        {"dagrun_timeout=timedelta(hours=2)": "dagrun_timeout=timedelta(seconds=30)"},
    ),
    # Tries that begin while the API server is stopped fail.
    "context_manager_shutdown_often_tried": (
        "context_manager_shutdown",
        {'"retries": 2': '"retries": 9'},
    ),
    "two_queries_retried_later": (
        "two_queries",
        {'"retry_delay": timedelta(seconds=1)': '"retry_delay": timedelta(hours=1)'},
    ),
    "notified_without_callbacks": (
        "notified",
        {
            "    on_failure_callback=clean_up,\n    on_success_callback=clean_up,\n": "",
            "import clean_up, use_cluster": "import use_cluster",
        },
    ),
    **{
        f"{dag_id}_by_proxy": (
            dag_id,
            {'"idle_timeout_mins": 10': '"idle_timeout_mins": 10, "connection_mode": "proxy"'},
        )
        for dag_id in ("status_check", "context_manager_shutdown", "manifest_reuse", "multi_stage")
    },
    # The same manifest, with another destination.
    "parallel_single_node_beside": (
        "parallel_single_node",
        {"/results/parallel_single_node": "/results/parallel_single_node_beside"},
    ),
}


def write_dags(folder: Path, sources: Mapping[str, str] | None = None) -> None:
    """Write the DAG files with the changes for these tests.

    Parameters
    ----------
    sources
        Source of each DAG, by id. By default the repository's DAGs, their variants, those in
        `tests/failures/dags` and the one in docs/helpers.md.
    """
    own = {path.stem: path.read_text() for path in (ROOT / "dags").glob("*.py")}
    others = {path.stem: path.read_text() for path in (TESTS / "dags").glob("*.py")}
    if sources is None:
        [mail_report] = re.findall(
            r"^```python\n(from airflow.*?)^```",
            (ROOT / "docs" / "helpers.md").read_text(),
            re.DOTALL | re.MULTILINE,
        )
        sources = own | others | {"mail_report": mail_report}
        for name, (dag_id, changes) in VARIANTS.items():
            if dag_id in DELETED:
                continue
            source = sources[dag_id].replace(f"def {dag_id}(", f"def {name}(")
            source = source.replace(f"\n{dag_id}()\n", f"\n{name}()\n")
            for old, new in changes.items():
                assert old in source, f"{dag_id} has no {old}"
                source = source.replace(old, new)
            sources = {**sources, name: source}
    folder.mkdir(parents=True)
    for name, source in sources.items():
        for old, new in OVERRIDES.items():
            source = source.replace(old, new)
        assert "@daily" not in source
        (folder / f"{name}.py").write_text(source)


class Emulator:
    """An emulator in its own process, which keeps its state when it is restarted."""

    def __init__(self, folder: Path) -> None:
        self._env_file = folder / "env"
        self._command = [sys.executable, "-m", "polars_cloud_emulator", "serve"]
        self._command += ["--port-base", str(free_ports(3)), "--env-file", str(self._env_file)]
        self._command += ["--state-dir", str(folder / "state")]
        self._options: list[str] = []
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [*self._command, *self._options],
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the emulator did not start"
        self.api = RunningEmulator(read_env_file(self._env_file), self._process.pid)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def restart_with(self, *options: str) -> None:
        """Restart the emulator unless it already runs with these options."""
        if self._options != [*options]:
            self.stop()
            self._options = [*options]
            self.start()

    # Observations

    def queries(self) -> list[dict[str, Any]]:
        queries: list[dict[str, Any]] = self.api.state()["queries"]
        return queries

    def running_queries(self) -> list[dict[str, Any]]:
        return [query for query in self.queries() if not query["ended_at"]]

    def live_clusters(self) -> list[dict[str, Any]]:
        return [c for c in self.api.state()["clusters"] if not c["stopped_at"]]

    def calls(self, operation: str) -> int:
        """Return the number of calls to a gRPC method, or to REST paths with this ending."""
        return sum(call["path"].endswith(operation) for call in self.api.journal())


@dataclass(frozen=True)
class Run:
    """A DAG run and its tasks."""

    deployment: "Deployment"
    dag_id: str
    run_id: str

    @property
    def path(self) -> str:
        return f"dags/{self.dag_id}/dagRuns/{urllib.request.quote(self.run_id)}"  # type: ignore[attr-defined]

    @property
    def state(self) -> str:
        [(state,)] = self._rows("SELECT state FROM dag_run")
        return str(state)

    def tasks(self) -> dict[str, str | None]:
        """Return the state of each task, by its id; a mapped one has `task[index]`."""
        return {
            task_id + (f"[{index}]" if index >= 0 else ""): state
            for task_id, index, state in self._rows(
                f"SELECT task_id, map_index, state FROM {TASK_INSTANCES}"
            )
        }

    def tries(self, task_id: str = "") -> int:
        """Return the number of tries of a task; without an id, the maximum of all tasks."""
        rows = self._rows(f"SELECT task_id, try_number FROM {TASK_INSTANCES}")
        return max(number for each, number in rows if task_id in ("", each))

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return the query's rows for this run.

        The tests poll several times a second, which would overload Airflow's API server.
        """
        where = "WHERE dag_id = ? AND run_id = ?"
        read_only = f"{self.deployment.database.as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(read_only, timeout=30, uri=True)) as database:
            return database.execute(f"{query} {where}", (self.dag_id, self.run_id)).fetchall()

    def process(self, task_id: str) -> psutil.Process:
        """Return the process that runs the task's function."""
        ids = dict(self._rows(f"SELECT task_id, id FROM {TASK_INSTANCES}"))
        title = f"airflow worker -- {uuid.UUID(ids[task_id])}"

        def find() -> psutil.Process | None:
            for process in psutil.process_iter(["cmdline"]):
                if " ".join(process.info["cmdline"] or ()).strip() == title:
                    return process
            return None

        process = self.deployment.eventually(find)
        assert process is not None
        return process

    def running_tasks(self) -> list[str]:
        """Wait until a task is running; return the ids of all running tasks, sorted."""
        return self.deployment.eventually(lambda: self.tasks_in("running"))

    def waiting_tasks(self) -> list[str]:
        """Wait until a task is running or deferred; return the ids of all such tasks, sorted."""
        return self.deployment.eventually(lambda: self.tasks_in("running", "deferred"))

    def is_deferred(self) -> bool:
        """Return whether tasks are deferred, a triggerer watches each of them, and no task runs."""
        deferred = len(self.tasks_in("deferred"))
        return (
            bool(deferred)
            and not self.tasks_in("running")
            and (self.log().count(' starting"') >= deferred)
        )

    def tasks_in(self, *states: str) -> list[str]:
        """Return the ids of the tasks in these states, sorted."""
        return sorted(task for task, state in self.tasks().items() if state in states)

    def wait_for_end(self) -> None:
        """Wait until the run and all its tasks have ended."""

        def ended() -> bool:
            ended = self.state in {"success", "failed"}
            return ended and set(self.tasks().values()) <= TASK_ENDS

        self.deployment.eventually(ended)

    def links(self) -> set[str]:
        """Return where the links *Polars Cloud query* of its tasks lead, as for the UI."""
        answers = [
            self.deployment.call("GET", f"{self.path}/taskInstances/{task}/links?map_index={index}")
            for task, index in self._rows(f"SELECT task_id, map_index FROM {TASK_INSTANCES}")
        ]
        return {link for each in answers for link in each["extra_links"].values() if link}

    def log(self, task_id: str = "*", attempt: str = "*") -> str:
        """Return the logs of the tasks and their triggers, of all tries."""
        return "".join(path.read_text() for path in self.logs(task_id, attempt))

    def logs(self, task_id: str = "*", attempt: str = "*") -> list[Path]:
        """Return the log files of the tasks and their triggers."""
        folder = self.deployment.logs / f"dag_id={self.dag_id}" / f"run_id={self.run_id}"
        paths = folder.glob(f"task_id={task_id}/**/attempt={attempt}.log*")
        return sorted(path for path in paths if path.suffix == ".log")

    def ends(self, task_id: str) -> dict[int, datetime]:
        """Return the end of each instance of a mapped task, by map index."""
        rows = self._rows(f"SELECT task_id, map_index, end_date FROM {TASK_INSTANCES}")
        return {
            index: datetime.fromisoformat(end).replace(tzinfo=UTC)
            for each, index, end in rows
            if each == task_id
        }

    def try_numbers(self, task_id: str) -> list[int]:
        """Return the number of tries of each instance of a mapped task."""
        rows = self._rows(f"SELECT task_id, try_number FROM {TASK_INSTANCES}")
        return [number for each, number in rows if each == task_id]

    def seconds(self) -> float:
        """Return the seconds from the run's start to its end."""
        [dates] = self._rows("SELECT start_date, end_date FROM dag_run")
        start, end = map(datetime.fromisoformat, dates)
        return (end - start).total_seconds()

    def mark(self, state: str, task_id: str | None = None) -> None:
        """Mark the run or one of its tasks, as a user does."""
        if task_id is None:
            self.deployment.call("PATCH", self.path, state=state)
        else:
            self.deployment.call("PATCH", f"{self.path}/taskInstances/{task_id}", new_state=state)

    def clear(self, *task_ids: str, only_failed: bool = False) -> None:
        """Clear some or all tasks of the run, as a user does."""
        self.deployment.call(
            "POST",
            f"dags/{self.dag_id}/clearTaskInstances",
            dag_run_id=self.run_id,
            dry_run=False,
            only_failed=only_failed,
            **({"task_ids": list(task_ids)} if task_ids else {}),
        )


class Deployment:
    """Airflow with scheduler, LocalExecutor and SQLite, on one emulator."""

    patience = 300.0
    """Maximum seconds to wait for anything to happen in Airflow."""

    def __init__(self, home: Path, port: int, emulator: Emulator) -> None:
        self.emulator = emulator
        self.logs = home / "logs"
        self.database = home / "airflow.db"
        self._dags = home.parent / "dags"
        self._port = port
        self._url = f"http://127.0.0.1:{port}"
        self._components: dict[str, contextlib.ExitStack] = {}
        self.processes: dict[str, psutil.Process] = {}
        self._log_path = home / "airflow.log"

    @functools.cached_property
    def _token(self) -> str:
        return get_token(self._port)

    def call(self, method: str, path: str, **body: object) -> Any:
        request = urllib.request.Request(
            f"{self._url}/api/v2/{path}",
            data=json.dumps(body).encode() if body else None,
            headers={
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self._token}",
            },
            method=method,
        )

        def answer() -> tuple[Any] | None:
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    return (json.loads(response.read() or "null"),)
            except urllib.error.HTTPError as error:
                text = error.read().decode()
                # SQLite was locked, and nothing was done. Older Airflows do not say so.
                if "Database error" in text or text == "Internal Server Error":
                    return None
                raise AssertionError(f"{method} {path}: {error} {text}") from None
            except OSError:
                return None  # the API server was not running

        found = eventually(answer, pause=0.5)
        assert found
        return found[0]

    def eventually(self, condition: Callable[[], T]) -> T:
        return eventually(condition, self.patience, pause=0.3)

    def end_runs(self) -> None:
        """End all queries, clusters and DAG runs."""
        self.emulator.api.reset()
        for run in self.call("GET", "dags/~/dagRuns?state=running&limit=100")["dag_runs"]:
            Run(self, run["dag_id"], run["dag_run_id"]).mark("failed")
        active = "dags/~/dagRuns/~/taskInstances?state=running&state=queued&limit=100"
        eventually(lambda: not self.call("GET", active)["task_instances"], pause=0.3)
        self.emulator.api.reset()

    def trigger(self, dag_id: str, **params: bool) -> Run:
        answer = self.call("POST", f"dags/{dag_id}/dagRuns", logical_date=None, conf=params)
        return Run(self, dag_id, answer["dag_run_id"])

    def parsed_at(self, dag_id: str) -> str:
        """Return when the DAG file was last parsed."""
        return str(self.call("GET", f"dags/{dag_id}")["last_parsed_time"])

    def callback_log(self, dag_id: str) -> str:
        """Return the log of a DAG's callbacks."""
        paths = self.logs.glob(f"dag_processor/*/dags-folder/{dag_id}.py.log")
        return "".join(path.read_text() for path in paths)

    def component_log(self) -> str:
        """Return the log of Airflow's components, including the triggerer's sweep."""
        return self._log_path.read_text()

    def count_task_processes(self) -> int:
        """Return the number of running task processes."""
        count = 0
        for process in self.processes[SCHEDULER].children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                count += re.fullmatch(TASK_PROCESS, " ".join(process.cmdline()).strip()) is not None
        return count

    @contextlib.contextmanager
    def running(self, *components: str) -> Iterator[None]:
        """Run components of Airflow, given as `airflow` commands, while the context is open."""
        for component in components:
            self._start(component)
        try:
            yield
        finally:
            for component in components:  # in parallel, because each one takes long to stop
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.processes[component].terminate()
            for component in components:
                self._components.pop(component).close()

    @contextlib.contextmanager
    def without(self, component: str) -> Iterator[None]:
        """Stop a component while the context is open."""
        self._components.pop(component).close()
        try:
            yield
        finally:
            self._start(component)

    def kill(self, component: str) -> None:
        """Kill a component and its children with SIGKILL; `without` starts it again."""
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self.processes[component].pid:
                    process.kill()

    @contextlib.contextmanager
    def edited(self, dag_id: str, edit: Callable[[str], str]) -> Iterator[None]:
        """Change the source of a DAG file while the context is open."""
        path = self._dags / f"{dag_id}.py"
        before = path.read_text()
        path.write_text(edit(before))
        try:
            yield
        finally:
            path.write_text(before)

    @contextlib.contextmanager
    def deleted(self, dag_id: str) -> Iterator[None]:
        """Delete a DAG file while the context is open."""
        path = self._dags / f"{dag_id}.py"
        before = path.read_text()
        path.unlink()
        try:
            yield
        finally:
            path.write_text(before)
            self.eventually(lambda: not self.call("GET", f"dags/{dag_id}")["is_stale"])

    def _start(self, component: str) -> None:
        self._components[component] = stack = contextlib.ExitStack()
        log = stack.enter_context(self._log_path.open("a"))
        processes = stack.enter_context(airflow(component, log=log))
        self.processes[component] = psutil.Process(processes[component].pid)


QUICK_INTERVALS = {
    "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
    # Notice an edit in seconds. Do not parse unchanged files again, which would slow down others.
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
    "AIRFLOW__DAG_PROCESSOR__STALE_DAG_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__PARSING_CLEANUP_INTERVAL": "5",
    # Notice a dead worker in seconds.
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
    # The next scheduler notices a dead one.
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "3",
    # Another triggerer notices a dead one.
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "2",
}
"""Airflow's settings, in seconds, with which it notices failures earlier than by default."""


@contextlib.contextmanager
def running_deployment(
    folder: Path,
    sources: Mapping[str, str] | None = None,
    *,
    slots: int = 6,
    options: Mapping[str, str] = QUICK_INTERVALS,
) -> Iterator[Deployment]:
    """Run Airflow while the context is open.

    Parameters
    ----------
    sources
        See `write_dags`.
    slots
        Maximum number of tasks that run at once.
    options
        Further settings of Airflow.
    """
    home = folder / "airflow"
    home.mkdir()
    write_dags(folder / "dags", sources)
    emulator = Emulator(folder)
    port = free_ports(1)
    before = os.environ.copy()
    try:
        os.environ |= settings(port) | {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
            "AIRFLOW__CORE__PARALLELISM": str(slots),
            "POLARS_CLOUD_OUTAGE": str(OUTAGE),
            **options,
        }
        use_emulator(emulator.api.environment)
        with (home / "airflow.log").open("a") as log:
            subprocess.run(
                [sys.executable, "-m", "airflow", "db", "migrate"],
                stdout=log,
                stderr=log,
                check=True,
            )
        deployment = Deployment(home, port, emulator)
        with deployment.running(API_SERVER, DAG_PROCESSOR):
            eventually(lambda: health(port), READY_IN, pause=0.5)
            with deployment.running(TRIGGERER, SCHEDULER):
                dag_ids = {path.stem for path in (folder / "dags").glob("*.py")}

                def known() -> bool:
                    dags = deployment.call("GET", "dags?limit=100")["dags"]
                    return {dag["dag_id"] for dag in dags} == dag_ids

                eventually(known, READY_IN, pause=0.5)
                yield deployment
    finally:
        os.environ.clear()
        os.environ |= before
        emulator.stop()


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports, below the ephemeral range."""
    while True:
        # At random, because other processes search at the same time.
        port = random.randrange(10_000, 32_000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for offset in range(count):
                held.enter_context(socket.create_server(("127.0.0.1", port + offset)))
            return port


def with_polars(processes: Iterable[psutil.Process]) -> list[str]:
    """Return the command lines of the processes that have loaded Polars' shared library."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if any("_polars_runtime" in mapped.path for mapped in process.memory_maps()):
                found.append(" ".join(process.cmdline()))
    return found
