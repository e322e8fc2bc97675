"""The commands and examples of the README and the pages in docs/ are run in CI."""

import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from include.shop import PLACEHOLDER
from left_to_do import OLDEST_AIRFLOW
from local_airflow import ROOT
from polars_cloud_emulator.protocol.client_check import CLIENT_VERSION
from polars_cloud_emulator.testing import RunningEmulator
from polars_remote import errors
from polars_remote.compat.versions import AirflowFailException
from tests.failures.scenarios import GROUPS, SCENARIOS, SHOWN_WITHOUT_SCHEDULER
from tests.failures.table import exceptions, listing, overview
from tests.test_versions import AIRFLOW, minor, pythons

README = ROOT / "README.md"
YOUR_OWN = ROOT / "docs" / "your-own.md"
PAGES = [README, *sorted({*(ROOT / "docs").glob("*.md")} - {YOUR_OWN})]
RUN_A_DAG = """
from airflow.dag_processing.dagbag import DagBag
print("the run ended:", DagBag().dags["orders"].test().state)
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run_python(code: str, variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code]
    environment = os.environ | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def runs(step: str, command: str) -> bool:
    """Return whether a step of CI runs this `make` command, alone or with others."""
    ran, typed = (
        # Ignore the folder to copy to.
        {word for word in make.split() if not word.startswith(("--", "TO="))}
        for make in (step.rpartition("make ")[2], command.removeprefix("make "))
    )
    variables = {word for word in ran if "=" in word}
    return variables <= typed <= ran


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_run_by_ci(page: Path) -> None:
    ci = {name: (ROOT / ".ci" / name).read_text() for name in ("run", "compose")}
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    if page == README:
        assert {"make demo", "make test", "docker compose up"} <= set(lines)
    for command in lines:
        if command.startswith("docker compose "):
            words = ", ".join(f'"{word}"' for word in command.split()[2:])
            calls = (f"compose({words}", f'"compose", {words}')
            assert any(call in ci["compose"] for call in calls), command
        elif command.startswith("make "):
            steps = re.findall(r"^ *step (.*)", ci["run"], re.MULTILINE)
            assert any(runs(step, command) for step in steps), command


def test_every_command_of_the_page_about_a_repository_of_your_own_is_run_by_ci() -> None:
    assert "step .ci/your_own\n" in (ROOT / ".ci" / "run").read_text()
    assert f"$PWD/docs/{YOUR_OWN.name}" in (ROOT / ".ci" / "your_own").read_text()


def test_the_dag_of_the_readme_runs(
    emulator: RunningEmulator, airflow_db: None, tmp_path: Path
) -> None:
    [code] = blocks(README, "python")
    (tmp_path / "orders.py").write_text(code)
    ran = run_python(RUN_A_DAG, {"AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path)})
    assert "the run ended: success" in ran.stdout, ran.stdout + ran.stderr
    counts = pl.read_parquet("s3://your-bucket/results/orders.parquet")
    rows = pl.scan_parquet("s3://your-bucket/sales/").select(pl.len()).collect().item()
    assert counts["len"].sum() == rows


def test_the_session_of_the_page_about_helpers_runs(emulator: RunningEmulator) -> None:
    page = ROOT / "docs" / "helpers.md"
    [code] = [block for block in blocks(page, "python") if "import polars" in block]
    ran = run_python(code, emulator.environment)
    assert "completed" in ran.stdout, ran.stdout + ran.stderr


def test_the_page_about_helpers_names_each_of_them() -> None:
    import polars_remote

    page = (ROOT / "docs" / "helpers.md").read_text()
    [table] = re.findall(r"^\| helper.*?\n\n", page, re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`@?(\w+)", table))
    assert set(polars_remote.__all__) - {"Query"} <= named


def test_the_page_about_helpers_names_each_error_and_whether_it_is_retried() -> None:
    page = (ROOT / "docs" / "helpers.md").read_text()
    [table] = re.findall(r"^\| class \|.*?\n\n", page, re.DOTALL | re.MULTILINE)
    documented = re.findall(r"^\| `(\w+)` \|.*\| (\w+).*\|$", table, re.MULTILINE)
    classes = [
        each
        for each in vars(errors).values()
        if isinstance(each, type)
        and issubclass(each, errors.PolarsRemoteError)
        and each is not errors.PolarsRemoteError
    ]
    # An error while the DAG file is parsed does not fail a try.
    final = (AirflowFailException, errors.SettingsError)
    assert documented == [
        (each.__name__, "no" if issubclass(each, final) else "yes") for each in classes
    ]


def test_the_table_of_settings_names_each_variable_that_is_read_and_its_default() -> None:
    rows = re.findall(
        r"^\| `(POLARS_CLOUD_\w+)` \| `?([^|`]+)`? \|", README.read_text(), re.MULTILINE
    )
    files = [ROOT / "include" / "shop.py", ROOT / "plugins" / "polars_remote" / "settings.py"]
    read = re.findall(
        r'"(POLARS_CLOUD_\w+)"(?:, "?([^")]+)"?)?\)', "".join(file.read_text() for file in files)
    )
    defaults = {name: default or "Polars Cloud" for name, default in read}
    no_default = {"POLARS_CLOUD_DATA": PLACEHOLDER, "POLARS_CLOUD_PRICE": "none"}
    assert dict(rows) == defaults | no_default


def test_the_tables_of_failures_say_what_is_tested() -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    for table in (overview(), exceptions(), listing()):
        assert table in page, f"write this into docs/failures.md:\n{table}"
    assert f"<summary>All {len(SCENARIOS)} kinds</summary>" in page
    assert f"[{len(SCENARIOS)} kinds of failure]" in README.read_text()


def test_each_failure_stands_in_one_group() -> None:
    assert len(SCENARIOS) == sum(len(group.scenarios) for group in GROUPS)


def test_each_failure_that_needs_no_scheduler_names_an_existing_test() -> None:
    assert SHOWN_WITHOUT_SCHEDULER.keys() < SCENARIOS.keys()
    for test in SHOWN_WITHOUT_SCHEDULER.values():
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(), test


def test_the_pages_name_the_versions_that_are_tested() -> None:
    words = " ".join(README.read_text().split())
    assert f"Apache Airflow {OLDEST_AIRFLOW} to {minor(AIRFLOW)}" in words
    assert f"Python {pythons()[-1]} or newer" in words
    emulator = (ROOT / "emulator" / "README.md").read_text()
    assert f"`polars_cloud` {CLIENT_VERSION} client" in emulator
