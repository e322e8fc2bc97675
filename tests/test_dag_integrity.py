"""The DAG files as Airflow parses them: no database, no network, no emulator."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

from copy_dag import find_modules
from local_airflow import PATTERNS, ROOT, UPKEEP, get_function, shorten
from polars_remote import clean_up
from tests.eight_dags import KEPT

DAG_IDS = set(PATTERNS)
SHUT_DOWN_BY_TASK = {
    dag_id for dag_id in KEPT if "shared_cluster(" in (ROOT / "dags" / f"{dag_id}.py").read_text()
}
CLUSTER_TASKS = {"start_cluster", "stop_cluster"}
"""Made by `shared_cluster`, which logs them in."""
WAITS = re.compile(r"\.await_result\(|\.execute\((?![^)]*\bblocking=False)")
"""Calls that return when a query has ended."""

PARSER = """
import json, os, sys, warnings
from pathlib import Path
from airflow.dag_processing.dagbag import BundleDagBag
from watched_parse import touches, watch

def parse(path, python_path):
    sys.path += python_path
    warnings.filterwarnings("error", module="unusual_prefix_|include")  # only of these files
    watch()
    bag = BundleDagBag(Path(path), bundle_path=Path(path), bundle_name="dags-folder")
    return {"dags": sorted(bag.dags), "errors": bag.import_errors, "touches": touches}

for request in sys.stdin:
    if os.fork() == 0:
        print(json.dumps(parse(*json.loads(request))), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit("a parse has failed")
"""
ADVICE = {
    "import": (
        "imports {what} while the DAG is parsed. Airflow parses it every few seconds, and this "
        "import takes longer than all the rest. Move it into the functions that need it: the "
        "first line of a task's function is `import polars as pl`"
    ),
    "secret": (
        "reads the {what} while the DAG is parsed. Airflow parses it every few seconds, and asks "
        "its database each time. Read it in the function of the task that needs it"
    ),
    "call": (
        "calls the network while the DAG is parsed: {what}. Airflow parses it every few seconds, "
        "and shows no DAG while the other side is away. Move the call into the function of a task"
    ),
}
"""What to do about a touch, by its kind."""

Parse = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def dags() -> dict[str, DAG]:
    with warnings.catch_warnings(action="ignore"):  # the first test refuses a DAG file's own
        return DagBag(ROOT / "dags").dags


@pytest.fixture(scope="module")
def parse() -> Iterator[Parse]:
    """Parse a DAGs folder, or a file, as Airflow's DAG processor does, and tell what that touched.

    Modules are found below `python_path` and, as everywhere in Airflow, in the DAGs folder itself.
    """
    environment = {
        **os.environ,
        "AIRFLOW__SECRETS__BACKEND": "watched_parse.RecordingSecrets",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    command = [sys.executable, "-P", "-c", PARSER]
    with subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True) as parser:
        assert parser.stdin is not None
        assert parser.stdout is not None

        def request(path: Path, *python_path: Path) -> dict[str, Any]:
            print(json.dumps([str(path), [*map(str, python_path)]]), file=parser.stdin, flush=True)
            report: dict[str, Any] = {}
            while not report:
                line = parser.stdout.readline()  # type: ignore[union-attr]
                assert line, "see what it wrote to stderr"
                if line.startswith("{"):  # Airflow may print, too
                    report = json.loads(line)
            return report

        yield request
        parser.stdin.close()


def source_of(task: Any) -> str:
    """The code that a task calls; of an operator without such, nothing."""
    function = get_function(task)
    return inspect.getsource(function) if function else ""


def get_callbacks(callbacks: Any) -> list[Any]:
    """What a DAG calls back, which may be one function or several."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]


def find_dag(dags: dict[str, DAG], dag_id: str) -> DAG:
    """Return a DAG; the first test says why there is none."""
    if dag_id not in dags:
        refuse(f"dags/{dag_id}.py: there is no DAG {dag_id}")
    return dags[dag_id]


def refuse(*problems: str) -> None:
    """Fail if there are problems, with no other lines than theirs: they are about a user's file."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def place_of(task: Any) -> str:
    """Name the line at which a task's function begins."""
    function = get_function(task)
    assert function is not None
    code = inspect.unwrap(function).__code__
    return f"{name_of(code.co_filename)}, line {code.co_firstlineno}"


def name_of(file: str) -> str:
    """Name a file from the root of the repository, if it lies there."""
    return os.path.relpath(file, ROOT) if file.startswith(f"{ROOT}/") else file


def describe_touches(touches: list[Any], file: Path) -> list[str]:
    """Say in which line a file touches something, and what to do instead; once for each line."""
    advice: dict[str, str] = {}
    for kind, what, lines in touches:
        ours = [
            f"{name_of(name)}, line {line}"
            for name, line in lines
            if name == str(file) or name.startswith(f"{ROOT / 'include'}/")
        ]
        place = " → ".join(ours or [name_of(str(file))])
        advice.setdefault(place, f"{place}: {ADVICE[kind].format(what=what)}")
    return [*advice.values()]


@pytest.mark.parametrize("dag_id", sorted(DAG_IDS | UPKEEP))
def test_a_dag_file_defines_a_dag_of_its_name_and_touches_nothing(
    parse: Parse, dag_id: str
) -> None:
    file = ROOT / "dags" / f"{dag_id}.py"
    report = parse(file, ROOT, ROOT / "plugins")
    refuse(*map(shorten, report["errors"].values()))
    refuse(*describe_touches(report["touches"], file))
    if dag_id not in report["dags"]:
        found = ", ".join(report["dags"])
        refuse(
            f"dags/{dag_id}.py defines no DAG {dag_id}"
            + (
                f", but {found}. Give the file the name of its DAG: dags/{report['dags'][0]}.py"
                if found
                else ". Call the function that is below @dag at the end of the file. A module "
                "without a DAG belongs into include/"
            )
        )


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("Variable.get('shop', default=None)", "reads the Variable 'shop' while"),
        ("BaseHook.get_connection('polars_cloud')", "reads the Connection 'polars_cloud' while"),
        ("import socket; socket.getaddrinfo('127.0.0.1', 9)", "calls the network while"),
        ("import polars", "imports polars while"),
        ("import polars_cloud", "imports polars_cloud while"),
    ],
)
def test_a_dag_file_that_does_more_than_define_gets_its_line_and_advice(
    parse: Parse, tmp_path: Path, line: str, advice: str
) -> None:
    file = tmp_path / "careless.py"
    file.write_text(f"from airflow.sdk import BaseHook, DAG, Variable\n{line}")
    [problem] = describe_touches(parse(file)["touches"], file)
    assert problem.startswith(f"{file}, line 2: {advice}")
    assert re.search(r"\b(Move|Read) .+ function", problem)


@pytest.mark.parametrize("dag_id", sorted(DAG_IDS))
def test_a_dag_says_what_it_is_for(dags: dict[str, DAG], dag_id: str) -> None:
    dag = find_dag(dags, dag_id)
    if not dag.doc_md:
        refuse(
            f"dags/{dag_id}.py: the DAG does not say what it is for. Write a docstring into the "
            "function that is below @dag; Airflow shows it"
        )
    if dag_id in KEPT:
        assert dag.doc_md is not None
        assert "**Cost:**" in dag.doc_md
        assert {"polars-cloud", "shop"} <= dag.tags
        assert not dag.catchup
        assert dag.default_args["retries"] > 0
        assert dag.default_args["retry_delay"].total_seconds() > 0


@pytest.mark.parametrize("dag_id", sorted(KEPT | UPKEEP))
def test_a_dag_works_in_another_deployment_with_only_what_it_names(
    dags: dict[str, DAG], parse: Parse, tmp_path: Path, dag_id: str
) -> None:
    dag = dags[dag_id]
    [named] = re.findall(r"\*\*Copy along:\*\* the folders? (.+)\.", dag.doc_md or "")
    shutil.copy(dag.fileloc, tmp_path)
    for folder in re.findall(r"`([\w/]+)/`", named):
        shutil.copytree(ROOT / folder, tmp_path / Path(folder).name)

    # Nothing but the DAGs folder, which Airflow itself adds to the path.
    report = parse(tmp_path)
    assert report["errors"] == {}
    assert report["dags"] == [dag_id]


@pytest.mark.parametrize("dag_id", sorted(KEPT | UPKEEP))
def test_a_dag_works_beside_an_include_folder_of_the_users_own(
    dags: dict[str, DAG], parse: Parse, tmp_path: Path, dag_id: str
) -> None:
    include = tmp_path / "include"
    include.mkdir()
    for name in ("__init__", "settings", "queries", "clusters"):
        (include / f"{name}.py").write_text("MINE = True\n")
    shutil.copy(dags[dag_id].fileloc, tmp_path)
    for module in find_modules(Path(dags[dag_id].fileloc)):
        shutil.copy(module, include)

    report = parse(tmp_path, ROOT / "plugins")
    assert report["errors"] == {}
    assert report["dags"] == [dag_id]


def test_the_folder_of_helpers_works_by_another_name_and_in_another_place(
    parse: Parse, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "plugins" / "polars_remote", tmp_path / "company" / "remote")
    (tmp_path / "reports.py").write_text(
        "from airflow.sdk import dag\n"
        "from company.remote import clean_up, query_task, shared_cluster\n"
        "@dag(schedule=None, on_failure_callback=clean_up)\n"
        "def reports():\n"
        '    with shared_cluster({"name": "reports"}):\n'
        "        pass\n"
        "reports()\n"
    )
    report = parse(tmp_path)
    assert report["errors"] == {}
    assert report["dags"] == ["reports"]


def test_a_cluster_without_a_name_is_an_error_while_the_dag_file_is_parsed(
    parse: Parse, tmp_path: Path
) -> None:
    (tmp_path / "reports.py").write_text(
        "from airflow.sdk import dag\n"
        "from polars_remote import shared_cluster\n"
        "@dag(schedule=None)\n"
        "def reports():\n"
        '    with shared_cluster({"cpus": 2, "memory": 4}):\n'
        "        pass\n"
        "reports()\n"
    )
    [error] = parse(tmp_path, ROOT / "plugins")["errors"].values()
    assert "A cluster needs a name" in error


def test_an_authenticated_function_that_is_no_task_gets_a_clear_error(
    parse: Parse, tmp_path: Path
) -> None:
    (tmp_path / "reports.py").write_text(
        "from airflow.sdk import dag\n"
        "from include.auth import authenticate\n"
        "@dag(schedule=None)\n"
        "def reports():\n"
        "    @authenticate\n"
        "    def count():\n"
        "        return 1\n"
        "    count()\n"
        "reports()\n"
    )
    [error] = parse(tmp_path, ROOT, ROOT / "plugins")["errors"].values()
    assert 'reports.py", line 8, in reports' in error
    assert "put @query_task, or @task, above @authenticate" in error


@pytest.mark.parametrize("dag_id", sorted(DAG_IDS))
def test_every_task_that_makes_a_query_is_authenticated(dags: dict[str, DAG], dag_id: str) -> None:
    tasks = [task for task in find_dag(dags, dag_id).tasks if task.task_id not in CLUSTER_TASKS]
    assert tasks or dag_id not in KEPT
    for task in tasks:
        if dag_id not in KEPT and ".remote(" not in source_of(task):
            continue
        wrapper = get_function(task)
        assert wrapper is not None
        if Path(wrapper.__code__.co_filename) != ROOT / "include" / "auth.py":
            refuse(
                f"{place_of(task)}: the task {task.task_id} makes a remote query, but does not log "
                "in. Write @authenticate between @query_task, or @task, and the function: from "
                "include.auth import authenticate"
            )


@pytest.mark.parametrize("dag_id", sorted(DAG_IDS | UPKEEP))
def test_every_task_that_waits_has_a_time_limit(dags: dict[str, DAG], dag_id: str) -> None:
    for task in find_dag(dags, dag_id).tasks:
        source = source_of(task)
        is_waiting = WAITS.search(source) or (source and task.task_id in CLUSTER_TASKS)
        if (is_waiting or dag_id in UPKEEP) and task.execution_timeout is None:
            refuse(
                f"{place_of(task)}: the task {task.task_id} waits in its worker without a limit. "
                "Write @task(execution_timeout=timedelta(minutes=30)). Or let a @query_task "
                "return the query, from sink_parquet(...) or execute(blocking=False): then it "
                "holds no worker slot"
            )


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return 1", None),
        ("return lf.remote(ctx).sink_parquet(uri)", "makes a remote query, but does not log in"),
        ("return lf.remote(ctx).execute()", "waits in its worker without a limit"),
    ],
)
def test_an_error_about_a_users_task_names_its_line_and_what_to_write(
    tmp_path: Path, body: str, problem: str | None
) -> None:
    (tmp_path / "reports.py").write_text(
        "from airflow.sdk import dag, task\n"
        "@dag(schedule=None)\n"
        "def reports():\n"
        "    @task\n"
        "    def count():\n"
        f"        {body}\n"
        "    count()\n"
        "reports()\n"
    )
    dags = DagBag(tmp_path).dags
    found = get_refusals(
        lambda: test_every_task_that_makes_a_query_is_authenticated(dags, "reports"),
        lambda: test_every_task_that_waits_has_a_time_limit(dags, "reports"),
    )
    assert bool(found) == (problem is not None)
    if problem:
        assert all(each.startswith(f"{tmp_path}/reports.py, line 4: the task c") for each in found)
        assert all("Write @" in each for each in found)
        assert problem in found[-1]


def test_an_error_about_a_users_dag_says_what_to_write() -> None:
    dags = {"reports": DAG("reports", schedule=None, on_failure_callback=clean_up)}
    said, cleaned = get_refusals(
        lambda: test_a_dag_says_what_it_is_for(dags, "reports"),
        lambda: test_a_run_is_cleaned_up_first_of_all_and_however_it_ends(dags, "reports"),
    )
    assert said.startswith("dags/reports.py: the DAG does not say")
    assert "Write a docstring" in said
    assert "Write on_failure_callback=[clean_up" in cleaned


def test_a_dag_file_that_was_not_imported_is_named_by_the_tests_that_need_its_dag() -> None:
    [problem] = get_refusals(lambda: test_a_dag_says_what_it_is_for({}, "reports"))
    assert problem == "dags/reports.py: there is no DAG reports"


def get_refusals(*checks: Callable[[], None]) -> list[str]:
    """Return what the checks say that do not pass."""
    problems = []
    for check in checks:
        try:
            check()
        except pytest.fail.Exception as error:
            problems.append(str(error))
    return problems


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("query.await_result().location", True),
        ("lf.remote(ctx).execute()", True),
        ("lf.remote(ctx).execute(blocking=True)", True),
        ("lf.remote(ctx).execute(blocking=False)", False),
        ("lf.remote(ctx).execute(\n    blocking=False,\n)", False),
        ("lf.remote(ctx).sink_parquet(uri)", False),
    ],
)
def test_a_call_that_waits_is_distinguished_from_one_that_does_not(line: str, waits: bool) -> None:
    assert bool(WAITS.search(line)) == waits


@pytest.mark.parametrize("dag_id", sorted(SHUT_DOWN_BY_TASK))
def test_every_query_lies_between_the_start_and_the_stop_of_its_cluster(
    dags: dict[str, DAG], dag_id: str
) -> None:
    dag = dags[dag_id]
    start, stop = dag.get_task("start_cluster"), dag.get_task("stop_cluster")
    assert start.is_setup
    assert stop.is_teardown
    # Else the teardown alone would decide whether the run succeeded.
    assert not stop.on_failure_fail_dagrun
    queries = [task for task in dag.tasks if task not in (start, stop)]
    assert queries
    for query in queries:
        assert start.task_id in query.get_flat_relative_ids(upstream=True), query.task_id
        assert stop.task_id in query.get_flat_relative_ids(upstream=False), query.task_id


@pytest.mark.parametrize("dag_id", sorted(KEPT - {"single_query"} | {"preflight"}))
def test_a_run_is_cleaned_up(dags: dict[str, DAG], dag_id: str) -> None:
    assert dags[dag_id].on_failure_callback is clean_up
    assert dags[dag_id].on_success_callback is clean_up


@pytest.mark.parametrize("dag_id", sorted(DAG_IDS | UPKEEP))
def test_a_run_is_cleaned_up_first_of_all_and_however_it_ends(
    dags: dict[str, DAG], dag_id: str
) -> None:
    dag = find_dag(dags, dag_id)
    ends = [get_callbacks(each) for each in (dag.on_failure_callback, dag.on_success_callback)]
    if any(clean_up in callbacks for callbacks in ends) and any(
        callbacks[:1] != [clean_up] for callbacks in ends
    ):
        refuse(
            f"dags/{dag_id}.py: clean_up does not come first in both callbacks of the DAG. Write "
            "on_failure_callback=[clean_up, ...], on_success_callback=[clean_up, ...]"
        )


def test_preflight_runs_by_hand_alone_and_asks_before_it_spends(dags: dict[str, DAG]) -> None:
    dag = dags["preflight"]
    assert dag.schedule is None
    assert dag.params["spend"] is False
    assert dag.doc_md is not None
    assert "**Cost:**" in dag.doc_md
    assert "shop" not in dag.tags


def test_end_orphans_runs_by_itself_and_ends_before_its_next_run(dags: dict[str, DAG]) -> None:
    dag = dags["end_orphans"]
    assert isinstance(dag.schedule, timedelta)
    assert dag.max_active_runs == 1
    assert not dag.catchup
    [task] = dag.tasks
    assert task.execution_timeout is not None
    assert task.execution_timeout < dag.schedule
    assert dag.doc_md is not None
    assert "**Cost:**" in dag.doc_md
    assert "shop" not in dag.tags


def test_only_a_teardown_starts_regardless_of_how_others_ended(dags: dict[str, DAG]) -> None:
    for dag_id in KEPT:
        for task in dags[dag_id].tasks:
            assert task.is_teardown or task.trigger_rule == "all_success", task
