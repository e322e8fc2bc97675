"""The library's wheel, installed where there is no `plugins/`, on each minor version of Airflow."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from local_airflow import ROOT
from polars_cloud_emulator.testing import RunningEmulator

SITE = ROOT / ".venv" / "wheel" / "site"
PYTHONS = {
    "3.3": ROOT / ".venv" / "bin" / "python",
    "3.2": ROOT / ".venv" / "airflow-3-2" / "bin" / "python",
    "3.1": ROOT / ".venv" / "airflow-3-1" / "bin" / "python",
}


@pytest.fixture(params=PYTHONS)
def report(
    request: pytest.FixtureRequest, polars_cloud_emulator: RunningEmulator, tmp_path: Path
) -> dict[str, Any]:
    """What an Airflow makes of the wheel."""
    shutil.copytree(ROOT / "include", tmp_path / "include")
    (tmp_path / "dags").mkdir()
    dag = (ROOT / "dags" / "manifest_reuse.py").read_text()
    assert "@query_task" in dag
    dag = dag.replace("@query_task", "@task.polars_query")
    (tmp_path / "dags" / "manifest_reuse.py").write_text(dag)
    others = ("AIRFLOW_", "PYTHON")
    environment = {name: each for name, each in os.environ.items() if not name.startswith(others)}
    ran = subprocess.run(
        [PYTHONS[request.param], "-P", ROOT / "tests" / "wheel" / "one_airflow.py"],
        env=environment
        | polars_cloud_emulator.environment
        | {
            "AIRFLOW_HOME": str(tmp_path),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
            "PYTHONPATH": os.pathsep.join([str(SITE), str(tmp_path)]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert report["airflow"].startswith(f"{request.param}.")
    assert polars_cloud_emulator.environment["POLARS_CLOUD_CLIENT_SECRET"] not in ran.stdout
    return report | {
        "log": ran.stdout[-10_000:],
        "clusters": polars_cloud_emulator.state()["clusters"],
    }


def test_airflow_registers_what_the_wheel_has_and_a_dag_runs(report: dict[str, Any]) -> None:
    is_oldest = report["airflow"].startswith("3.1.")
    assert report["provider"] == {
        "name": "Polars Cloud",
        # Airflow 3.1 asks the provider FAB for the labels, which is not installed here.
        "labels": {} if is_oldest else {"login": "Client ID", "password": "Client secret"},
        "links": ["polars_remote.links.QueryLink"],
        "heavy": [],
    }
    (right, _), (wrong, refusal), (none, missing) = report["tries"]
    assert (right, wrong, none) == (True, False, False)
    assert refusal == "Polars Cloud refuses this client ID and client secret"
    assert missing == "Set login = client ID and password = client secret"
    if report["airflow"].startswith("3.2."):
        return  # `dag.test()` does not work there with the newest FastAPI that 3.2 allows
    assert report["run"] == "success", report["log"]
    assert [cluster["status"] for cluster in report["clusters"]] == [
        "Idle"
    ]  # its idle timeout stops it
