"""`make check` and `make demo` in a repository with DAGs of the user's own."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_airflow import ROOT, find_dag_file
from tests.template.test_readme import README, blocks

[ORDERS] = blocks(README, "python")
MISTAKES = {
    "misspelled": ('group_by("status")', 'group_by("staus")'),
    "empty": (".group_by", ".limit(0).group_by"),
    "unknown_name": ("sink_parquet(COUNTS)", "sink_parquet(COUNT)"),
}
"""What each DAG has in place of a text of the README's example."""


def rename(code: str, dag_id: str) -> str:
    return re.sub(r"\borders\(\)", f"{dag_id}()", code)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """This repository with the README's example, and with DAGs that have a mistake each."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("include", "plugins", "scripts", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("emulator", "Makefile", "pyproject.toml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    (folder / "dags").mkdir()
    (folder / "dags" / "orders.py").write_text(ORDERS)
    (folder / "dags" / "refused.py").write_text("from airflow.sdk import dag\n1 / 0\n")
    for name, (right, wrong) in MISTAKES.items():
        code = rename(ORDERS.replace(right, wrong), name)
        assert wrong in code
        options = 'default_args={"retries": 2, "retry_delay": 1.0}'
        code = code.replace("schedule=None", f"schedule=None, {options}")
        (folder / "dags" / f"{name}.py").write_text(code)
    yield folder
    shutil.rmtree(folder)


def make(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = ["make", "-o", ".venv/installed", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def demo(clone: Path) -> list[str]:
    """What `make demo` says of each DAG, up to the table at the end."""
    dags = " ".join(["orders", *MISTAKES, "refused"])
    ran = make(clone, "demo", f"DAG={dags}", "ROWS=2")
    assert ran.returncode, ran.stdout + ran.stderr
    return re.split(r"^(?=\w+ \.\.\. |dags/|DAG )", ran.stdout, flags=re.MULTILINE)


def said_of(demo: list[str], dag_id: str) -> str:
    [said] = [part for part in demo if part.startswith((f"{dag_id} ", f"dags/{dag_id}."))]
    return said


def test_the_first_rows_of_each_result_are_shown(demo: list[str]) -> None:
    said = said_of(demo, "orders")
    assert said.startswith("orders ... success, 1 query, ")
    assert "count_orders wrote 4 rows: results/orders.parquet" in said
    assert len(re.findall(r"^  │ (?:completed|cancelled|pending|\?) ", said, re.MULTILINE)) == 2


def test_an_empty_result_is_named_as_such(demo: list[str]) -> None:
    assert "count_orders wrote 0 rows: results/orders.parquet" in said_of(demo, "empty")


def test_a_failed_query_is_told_with_its_own_lines_and_tried_once(demo: list[str]) -> None:
    said = said_of(demo, "misspelled")
    assert said.startswith("misspelled ... failed, 1 query, ")
    line = ORDERS.splitlines().index("    @query_task  # holds no worker slot while the query runs")
    assert f"count_orders failed: dags/misspelled.py, line {line + 1}" in said
    assert 'ColumnNotFoundError: unable to find column "staus"' in said
    assert 'Did you mean "status"?' in said
    assert "Resolved plan" not in said


def test_an_error_of_the_tasks_own_code_is_told_with_its_line(demo: list[str]) -> None:
    said = said_of(demo, "unknown_name")
    [line] = [n for n, text in enumerate(ORDERS.splitlines(), 1) if "(COUNTS)" in text]
    assert f"count_orders failed: dags/unknown_name.py, line {line}\n" in said
    assert "NameError: name 'COUNT' is not defined" in said


def test_a_dag_file_that_cannot_be_imported_is_told_with_its_line_alone(demo: list[str]) -> None:
    said = said_of(demo, "refused")
    assert 'File "dags/refused.py", line 2' in said
    assert "ZeroDivisionError" in said
    assert said.count("File ") == 1


@pytest.mark.parametrize("command", ["check", "demo", "copy"])
def test_a_dag_that_is_not_there_is_answered_with_those_that_are(clone: Path, command: str) -> None:
    ran = make(clone, command, "DAG=order", f"TO={clone}")
    assert ran.returncode
    assert "There is no DAG 'order' in dags/. Did you mean orders? There are empty," in ran.stderr
    assert ran.stdout == ""


def test_only_the_dag_that_was_named_is_checked(clone: Path) -> None:
    (clone / "dags" / "orders_daily.py").write_text(rename(ORDERS, "orders_daily"))
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-n0", "--dag=orders"]
    environment = {"PYTHONPATH": f"{clone}:{clone}/emulator:{clone}/plugins", "PATH": "/usr/bin"}
    collected = subprocess.run(
        [*command, "tests/test_dag_integrity.py"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout
    assert "[orders]" in collected
    assert set(re.findall(r"\[(.*)\]", collected)) == {"orders"}


def test_the_example_of_the_readme_has_types(clone: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", str(clone / "dags" / "orders.py")]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_file_of_a_dag_is_found_by_its_whole_name() -> None:
    assert find_dag_file("preflight") == ROOT / "dags" / "preflight.py"
    with pytest.raises(SystemExit, match="Did you mean preflight\\?"):
        find_dag_file("prefligt")
    with pytest.raises(SystemExit, match="There is no DAG 'pre'"):
        find_dag_file("pre")
