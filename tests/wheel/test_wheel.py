"""The library on each minor version of Airflow, as a wheel and as a folder of the plugins."""

import contextlib
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars  # noqa: F401  # loaded here to show that the test detects it
import psutil
import pytest

from local_airflow import ACCOUNT, ROOT
from polars_cloud_emulator.testing import RunningEmulator, eventually
from standalone import get_token, health, settings
from tests.failures.deployment import free_ports, with_polars

SITE = ROOT / ".venv" / "wheel" / "site"
PYTHONS = {
    "3.3": ROOT / ".venv" / "bin" / "python",
    "3.2": ROOT / ".venv" / "airflow-3-2" / "bin" / "python",
    "3.1": ROOT / ".venv" / "airflow-3-1" / "bin" / "python",
}


@dataclass(frozen=True)
class Installed:
    """A fresh Airflow with the wheel, whose DAGs use the emulator."""

    minor: str
    home: Path
    environment: dict[str, str]

    def run(self, script: Path) -> str:
        """Run a script in this Airflow's Python; return the output."""
        ran = subprocess.run(
            [PYTHONS[self.minor], "-P", script],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
        return ran.stdout

    @contextlib.contextmanager
    def api_server(self) -> Iterator["ApiServer"]:
        """Run the API server while the context is open."""
        port = free_ports(1)
        environment = self.environment | settings(port)
        with (self.home / "api-server.log").open("w") as log:
            airflow = [PYTHONS[self.minor], "-P", "-m", "airflow"]
            streams = {"stdout": log, "stderr": log}
            subprocess.run([*airflow, "db", "migrate"], env=environment, **streams, check=True)
            with subprocess.Popen([*airflow, "api-server"], env=environment, **streams) as process:
                try:
                    eventually(lambda: health(port), pause=0.5)
                    yield ApiServer(port, psutil.Process(process.pid))
                finally:
                    process.terminate()


@dataclass(frozen=True)
class ApiServer:
    port: int
    process: psutil.Process

    def call(self, method: str, path: str, **body: object) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            data=json.dumps(body).encode() if body else None,
            headers={
                "Content-Type": "application/json",
                "Authorization": f"Bearer {get_token(self.port)}",
            },
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def test_connection(self, **account: str) -> tuple[bool, str]:
        """Press *Test* in the form of a Connection; return the result and the message."""
        answer = self.call(
            "POST",
            "api/v2/connections/test",
            connection_id="tried",
            conn_type="polars_cloud",
            **account,
        )
        return answer["status"], answer["message"]


@pytest.fixture(params=PYTHONS)
def installed(
    request: pytest.FixtureRequest, polars_cloud_emulator: RunningEmulator, tmp_path: Path
) -> Installed:
    others = ("AIRFLOW_", "PYTHON")
    environment = {name: each for name, each in os.environ.items() if not name.startswith(others)}
    environment |= polars_cloud_emulator.environment
    for name in ACCOUNT:  # the account comes from the Connection
        del environment[name]
    return Installed(
        request.param,
        tmp_path,
        environment
        | {
            "AIRFLOW_HOME": str(tmp_path),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
            "PYTHONPATH": os.pathsep.join([str(SITE), str(tmp_path)]),
        },
    )


def test_airflow_registers_what_the_wheel_has_and_a_dag_runs(
    installed: Installed, polars_cloud_emulator: RunningEmulator
) -> None:
    shutil.copytree(ROOT / "include", installed.home / "include")
    (installed.home / "dags").mkdir()
    dag = (ROOT / "dags" / "manifest_reuse.py").read_text()
    assert "@query_task" in dag
    dag = dag.replace("@query_task", "@task.polars_query")
    (installed.home / "dags" / "manifest_reuse.py").write_text(dag)
    output = installed.run(ROOT / "tests" / "wheel" / "one_airflow.py")
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert report["airflow"].startswith(f"{installed.minor}.")
    assert polars_cloud_emulator.environment["POLARS_CLOUD_CLIENT_SECRET"] not in output
    assert report["provider"] == {
        "name": "Polars Cloud",
        "links": ["polars_remote.links.QueryLink"],
        "heavy": [],
    }
    if installed.minor == "3.2":
        return  # `dag.test()` does not work there with the newest FastAPI that 3.2 allows
    assert report["run"] == "success", output[-10_000:]
    clusters = polars_cloud_emulator.state()["clusters"]
    # The idle timeout stops the cluster.
    assert [cluster["status"] for cluster in clusters] == ["Idle"]


def test_a_connection_is_tested_by_an_api_server_that_loads_no_polars(
    installed: Installed, polars_cloud_emulator: RunningEmulator
) -> None:
    login, password = (
        polars_cloud_emulator.environment[f"POLARS_CLOUD_CLIENT_{name}"]
        for name in ("ID", "SECRET")
    )
    with installed.api_server() as api_server:
        assert api_server.call("GET", "api/v2/plugins/importErrors")["import_errors"] == []
        forms = api_server.call("GET", "ui/connections/hook_meta")
        [form] = [form for form in forms if form["connection_type"] == "polars_cloud"]
        fields = form["standard_fields"].items()
        assert {name: each["title"] for name, each in fields if each and not each["hidden"]} == {
            "login": "Client ID",
            "password": "Client secret",
        }
        assert api_server.test_connection(login=login, password=password) == (
            True,
            "Polars Cloud accepts this login",
        )
        assert api_server.test_connection(login=login, password="wrong") == (
            False,
            "Polars Cloud refuses this client ID and client secret",
        )
        assert api_server.test_connection(login=login) == (
            False,
            "Set login = client ID and password = client secret",
        )
        processes = [api_server.process, *api_server.process.children(recursive=True)]
        assert with_polars(processes) == []
        assert with_polars([psutil.Process()]) != []
    assert password not in (installed.home / "api-server.log").read_text()


@pytest.mark.parametrize("syntax", ["glob", "regexp"])
def test_airflow_loads_no_module_of_the_library_as_a_plugin(
    installed: Installed, syntax: str
) -> None:
    installed.environment["AIRFLOW__CORE__DAG_IGNORE_FILE_SYNTAX"] = syntax
    installed.environment["AIRFLOW__CORE__PLUGINS_FOLDER"] = str(ROOT / "plugins")
    installed.environment["PYTHONPATH"] = str(ROOT / "plugins")
    output = installed.run(ROOT / "tests" / "wheel" / "plugin_errors.py")
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert report["airflow"].startswith(f"{installed.minor}.")
    assert report["errors"] == {}
