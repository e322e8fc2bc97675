"""Fixtures for the tests of DAGs and library: an Airflow of their own."""

import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from local_airflow import PATTERNS, find_dag_file, use_airflow
from polars_cloud_emulator.testing import RunningEmulator
from tests.eight_dags import DELETED

if TYPE_CHECKING:
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    from tests.tries import StartTry, Supervisor

# Airflow reads its variables when it is imported, which is before any test is collected.
_airflow_home = tempfile.TemporaryDirectory(prefix="airflow-home-")
use_airflow(Path(_airflow_home.name))
# Without the emulator, an imported client connects to nothing, and never to the real service.
os.environ["POLARS_CLOUD_API_ADDR"] = "http://127.0.0.1:9"
os.environ["POLARS_CLOUD_DOMAIN"] = "nobody@127.0.0.1:9"
# After a read from S3, the concurrency limit of Polars 2.0 wakes the process every millisecond.
os.environ["POLARS_DISABLE_HTTP_RATE_LIMIT"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dag", action="append", default=[], help="test this DAG's file alone")


def pytest_configure(config: pytest.Config) -> None:
    for dag_id in config.getoption("--dag"):
        try:
            find_dag_file(dag_id)
        except SystemExit as error:  # pytest would print its own traceback
            raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect DAGs other than those of `--dag`, and tests of a DAG file that was deleted."""
    chosen = config.getoption("--dag")

    def is_about_deleted(item: pytest.Item) -> bool:
        names = [name for mark in item.iter_markers("dag") for name in mark.args]
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            names += [item.callspec.params.get("dag_id")]
        return any(
            f"{name}_".startswith(f"{deleted}_")
            for name in names
            if name not in PATTERNS
            for deleted in DELETED
        )

    def is_chosen(item: pytest.Item) -> bool:
        return not chosen or (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.callspec.params.get("dag_id") in chosen
        )

    deselected = [item for item in items if is_about_deleted(item) or not is_chosen(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True)
def info_log(caplog: pytest.LogCaptureFixture) -> None:
    """Capture the lines that Airflow logs by default."""
    caplog.set_level("INFO", "include")
    caplog.set_level("INFO", "polars_remote")


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty, migrated metadata database, shared by all test processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    database = folder / "airflow.db"
    with (folder / "migrating").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True)
            shutil.copy(Path(_airflow_home.name) / "airflow.db", database)
    return database


@pytest.fixture(scope="module")
def airflow_db(migrated_database: Path) -> None:
    """An empty metadata database in this process's AIRFLOW_HOME."""
    with (
        closing(sqlite3.connect(migrated_database)) as migrated,
        closing(sqlite3.connect(Path(_airflow_home.name) / "airflow.db")) as database,
    ):
        migrated.backup(database)


@pytest.fixture
def supervisor() -> Iterator["Supervisor"]:
    """A supervisor with Airflow's Variables and task states."""
    from airflow.sdk.execution_time.supervisor import set_supervisor_comms

    from tests.tries import Supervisor

    with set_supervisor_comms(supervisor := Supervisor()):
        yield supervisor


@pytest.fixture
def start_try(supervisor: "Supervisor") -> "StartTry":
    """Run the body of a `with` block as a try of the test's task."""
    from tests.tries import start_try

    return start_try


@pytest.fixture
def ti(start_try: "StartTry", emulator: RunningEmulator) -> Iterator["RuntimeTaskInstance"]:
    """The first try of a task, which is the test itself; unfinished queries are dropped."""

    class TestIsOver(Exception):
        pass

    with suppress(TestIsOver), start_try() as ti:
        yield ti
        emulator.clear_faults()
        raise TestIsOver


@pytest.fixture(autouse=True)
def always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check ownership at each call, because a test freezes a worker only for a moment."""
    monkeypatch.setattr("polars_remote.ownership.entry.OWNERSHIP_SECONDS", -1.0)


@pytest.fixture
def short_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten retries while Polars Cloud is unavailable."""
    monkeypatch.setattr("polars_remote.cloud.retry.OUTAGE_SECONDS", 0.5)
