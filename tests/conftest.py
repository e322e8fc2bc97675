"""What the tests of the DAGs share: an Airflow of their own."""

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

from local_airflow import use_airflow
from polars_cloud_emulator.testing import RunningEmulator
from tests.eight_dags import DELETED

if TYPE_CHECKING:
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    from tests.tries import StartTry, Supervisor

# Airflow reads its variables when it is imported: before any test is collected.
_airflow_home = tempfile.TemporaryDirectory(prefix="airflow-home-")
use_airflow(Path(_airflow_home.name))
# A client that is imported without the emulator reaches nothing, and never the real service.
os.environ["POLARS_CLOUD_API_ADDR"] = "http://127.0.0.1:9"
os.environ["POLARS_CLOUD_DOMAIN"] = "nobody@127.0.0.1:9"
# Once a process has read from S3, the limit of Polars 2.0 wakes it up every millisecond.
os.environ["POLARS_DISABLE_HTTP_RATE_LIMIT"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is about a DAG of the template that was deleted."""

    def is_about_deleted(item: pytest.Item) -> bool:
        names = [name for mark in item.iter_markers("dag") for name in mark.args]
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            names += [item.callspec.params.get("dag_id")]
        return any(f"{name}_".startswith(f"{deleted}_") for name in names for deleted in DELETED)

    deselected = [item for item in items if is_about_deleted(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A metadata database without content, which all processes of this run share."""
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
    """The metadata database in this process's AIRFLOW_HOME, as nothing has run yet."""
    with (
        closing(sqlite3.connect(migrated_database)) as migrated,
        closing(sqlite3.connect(Path(_airflow_home.name) / "airflow.db")) as database,
    ):
        migrated.backup(database)


@pytest.fixture
def supervisor() -> Iterator["Supervisor"]:
    """What keeps Airflow's Variables and the states of its tasks."""
    from airflow.sdk.execution_time.supervisor import set_supervisor_comms

    from tests.tries import Supervisor

    with set_supervisor_comms(supervisor := Supervisor()):
        yield supervisor


@pytest.fixture
def start_try(supervisor: "Supervisor") -> "StartTry":
    """Run the body of a `with` statement as a try of the test's task."""
    from tests.tries import start_try

    return start_try


@pytest.fixture
def ti(start_try: "StartTry", emulator: RunningEmulator) -> Iterator["RuntimeTaskInstance"]:
    """The test is the first try of a task; what it has not waited for is of no interest."""

    class TestIsOver(Exception):
        pass

    with suppress(TestIsOver), start_try() as ti:
        yield ti
        emulator.clear_faults()
        raise TestIsOver


@pytest.fixture(autouse=True)
def always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A try asks each time whether it is the owner: a worker is frozen for a moment only here."""
    monkeypatch.setattr("polars_remote.ownership.entry.OWNER_SECONDS", -1.0)


@pytest.fixture
def short_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls to a Polars Cloud that is unavailable are given up soon."""
    monkeypatch.setattr("polars_remote.cloud.retry.OUTAGE_SECONDS", 0.5)
