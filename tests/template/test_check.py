"""`make check` and `make demo` in a repository with DAGs of the user's own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from local_airflow import ROOT, find_dag_file
from polars_cloud_emulator.testing import eventually
from tests.template.test_readme import README, blocks

[ORDERS] = blocks(README, "python")
MISTAKES = {
    "misspelled": ('group_by("status")', 'group_by("staus")'),
    "empty": (".group_by", ".limit(0).group_by"),
    "unknown_name": ("sink_parquet(COUNTS)", "sink_parquet(COUNT)"),
}
"""What each DAG has in place of a text of the README's example."""
ANY_TASKS = """
from functools import partial

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import Param, dag, task

from include.auth import authenticate
from polars_remote import Query, query_task, use_cluster


class Refusing:
    def __call__(self) -> None:
        raise ValueError("refused")


@dag(schedule=None)
def multi_stage_mine() -> None:
    \"\"\"Has tasks of many kinds.\"\"\"

    @query_task
    @authenticate
    def label() -> Query:
        import polars as pl

        with use_cluster({"name": "mine", "cpus": 2, "memory": 4}) as ctx:
            remote = pl.LazyFrame({"x": [1]}).remote(ctx).labels("nightly")
            return remote.single_node().sink_parquet("s3://your-bucket/results/label.parquet")

    @task
    @authenticate
    def use_own_context() -> None:
        import polars as pl
        import polars_cloud as pc

        remote = pl.LazyFrame({"x": [1]}).remote(pc.ComputeContext(cpus=2, memory=4))
        remote.single_node().sink_parquet("s3://your-bucket/results/own.parquet")

    @task.sensor(poke_interval=1, timeout=10)
    def wait() -> bool:
        return True

    partly = PythonOperator(task_id="partly", python_callable=partial(print, 1))
    EmptyOperator(task_id="start_cluster") >> partly >> wait()
    label()
    use_own_context()


@dag(schedule=None)
def second() -> None:
    PythonOperator(task_id="refuse", python_callable=Refusing())


@dag(schedule=None, params={"day": Param(type="string")})
def third() -> None:
    EmptyOperator(task_id="begin")


multi_stage_mine()
second()
third()
"""

MAPPED = """
from airflow.sdk import dag, task

@dag(schedule=None)
def mapped():
    @task
    def divide(by):
        return 1 / by

    divide.expand(by=[1, 0])

mapped()
"""


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
    (folder / "dags" / "multi_stage_mine.py").write_text(ANY_TASKS)
    (folder / "dags" / "refused.py").write_text("from airflow.sdk import dag\n1 / 0\n")
    (folder / "dags" / "mapped.py").write_text(MAPPED)
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
    # As from a shell, even if Make runs the tests.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def demo(clone: Path) -> list[str]:
    """What `make demo` says of each DAG, up to the table at the end."""
    dags = " ".join(["orders", *MISTAKES, "multi_stage_mine", "mapped", "refused"])
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


def test_a_failed_query_is_printed_with_its_own_lines_and_tried_once(demo: list[str]) -> None:
    said = said_of(demo, "misspelled")
    assert said.startswith("misspelled ... failed, 1 query, ")
    line = ORDERS.splitlines().index("    @query_task  # holds no worker slot while the query runs")
    assert f"count_orders failed: dags/misspelled.py, line {line + 1}" in said
    assert 'ColumnNotFoundError: unable to find column "staus"' in said
    assert 'Did you mean "status"?' in said
    assert "Resolved plan" not in said


def test_an_error_of_the_tasks_own_code_is_printed_with_its_line(demo: list[str]) -> None:
    said = said_of(demo, "unknown_name")
    [line] = [n for n, text in enumerate(ORDERS.splitlines(), 1) if "(COUNTS)" in text]
    assert f"count_orders failed: dags/unknown_name.py, line {line}\n" in said
    assert "NameError: name 'COUNT' is not defined" in said


def test_a_failed_mapped_task_is_printed_with_its_index(demo: list[str]) -> None:
    line = MAPPED.splitlines().index("        return 1 / by") + 1
    [failed] = re.findall(r"^  (.+) failed: (.+)$", said_of(demo, "mapped"), re.MULTILINE)
    assert failed == ("divide[1]", f"dags/mapped.py, line {line}")


def test_a_dag_file_that_cannot_be_imported_is_printed_with_its_line_alone(demo: list[str]) -> None:
    said = said_of(demo, "refused")
    assert 'File "dags/refused.py", line 2' in said
    assert "ZeroDivisionError" in said
    assert said.count("File ") == 1


def test_queries_without_the_librarys_labels_are_shown_by_their_ids(demo: list[str]) -> None:
    said = said_of(demo, "multi_stage_mine")
    assert said.startswith("multi_stage_mine ... success, 2 queries, ")
    assert "label wrote 1 rows: results/label.parquet" in said
    assert re.search(r"query [0-9a-f]{8} wrote 1 rows: results/own.parquet", said)


def test_an_error_of_an_object_that_a_task_calls_is_printed_with_its_line(demo: list[str]) -> None:
    said = said_of(demo, "second")
    line = ANY_TASKS.splitlines().index('        raise ValueError("refused")') + 1
    assert f"refuse failed: dags/multi_stage_mine.py, line {line}\n" in said


def test_a_dag_that_cannot_begin_is_printed_and_the_others_run(demo: list[str]) -> None:
    said = said_of(demo, "third")
    assert said.startswith("third ... failed, 0 queries, ")
    assert "third failed: dags/multi_stage_mine.py\n" in said
    assert "ParamValidationError: Invalid input for param day" in said


@pytest.mark.parametrize("command", ["check", "demo", "copy"])
def test_a_dag_that_is_not_there_is_answered_with_those_that_are(clone: Path, command: str) -> None:
    ran = make(clone, command, "DAG=order", f"TO={clone}")
    assert ran.returncode
    assert "There is no DAG 'order' in dags/. Did you mean orders? The DAGs are empty" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_style_is_checked_once_the_rows_are_shown(clone: Path) -> None:
    line = 'print("a line that is longer than others")  # ' + "because of its comment " * 3
    wide = ORDERS.replace("        import polars as pl\n", f"        import polars as pl; {line}\n")
    (clone / "dags" / "wide.py").write_text(rename(wide, "wide"))
    ran = make(clone, "check", "DAG=wide")
    assert ran.returncode
    assert ran.stdout.index("count_orders wrote 4 rows") < ran.stdout.index("E501")
    assert "its style needs correction" in ran.stderr


def test_an_unknown_name_is_reported_alone_and_no_process_is_left(clone: Path) -> None:
    ran = make(clone, "check", "DAG=unknown_name")
    assert ran.returncode
    assert "F821 Undefined name `COUNT`" in ran.stdout
    assert "Starting Airflow" not in ran.stdout
    assert not [command for command in find_processes(clone) if "demo.py" in command]
    assert eventually(lambda: not find_processes(clone))


def find_processes(clone: Path) -> list[str]:
    """Return the commands of the processes that run in the clone or import from it."""
    commands = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(clone) in f"{process.info['cwd']} {command}":
            commands.append(command)
    return commands


def test_only_the_dag_that_was_named_is_checked(clone: Path) -> None:
    (clone / "dags" / "orders_daily.py").write_text(rename(ORDERS, "orders_daily"))
    collected = check_integrity(clone, "orders", "--collect-only")
    assert "[orders]" in collected
    assert set(re.findall(r"\[(.*)\]", collected)) == {"orders"}


def test_a_dag_may_be_named_like_a_deleted_one_and_have_tasks_of_any_kind(clone: Path) -> None:
    assert "\n5 passed, " in check_integrity(clone, "multi_stage_mine")


@pytest.mark.parametrize(
    ("module", "said"),
    [("airflow.decorators", "Please use `'airflow.sdk.dag'`"), ("airflow.sdk", "")],
)
def test_an_import_that_airflow_will_drop_is_reported_with_its_line(
    clone: Path, module: str, said: str
) -> None:
    code = ORDERS.replace("from airflow.sdk import dag", f"from {module} import dag")
    (clone / "dags" / "deprecated.py").write_text(rename(code, "deprecated"))
    checked = check_integrity(clone, "deprecated", "--exitfirst")
    assert ('File "dags/deprecated.py", line 1, in <module>' in checked) == bool(said)
    assert said in checked


def check_integrity(clone: Path, dag_id: str, *options: str) -> str:
    """Return what the first step of `make check` says of a DAG."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "tests/test_dag_integrity.py"]
    return subprocess.run(
        [*command, f"--dag={dag_id}", *options],
        cwd=clone,
        env={"PYTHONPATH": f"{clone}:{clone}/emulator:{clone}/plugins", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    ).stdout


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
