"""The DAG files as Airflow parses them: no database, no network, no emulator."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

from copy_dag import find_modules
from local_airflow import PATTERNS, ROOT, UPKEEP
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
import json, os, sys
from pathlib import Path
from airflow.dag_processing.dagbag import BundleDagBag
from recording_secrets import accesses

def parse(folder, python_path):
    connections = []
    sys.addaudithook(
        lambda event, args: connections.append(str(args))
        if event in {"socket.connect", "socket.getaddrinfo", "socket.sendto"} else None
    )
    sys.path += python_path
    bag = BundleDagBag(Path(folder), bundle_path=Path(folder), bundle_name="dags-folder")
    heavy = sorted({"polars", "polars_cloud"} & set(sys.modules))
    return {
        "dags": sorted(bag.dags), "errors": bag.import_errors, "heavy": heavy,
        "connections": connections, "secrets": accesses,
    }

for request in sys.stdin:
    if os.fork() == 0:
        print(json.dumps(parse(*json.loads(request))), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit("a parse has failed")
"""

Parse = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def dags() -> dict[str, DAG]:
    return DagBag(ROOT / "dags").dags


@pytest.fixture(scope="module")
def parse() -> Iterator[Parse]:
    """Parse a DAGs folder as Airflow's DAG processor does, in a fork, and tell what that touched.

    Modules are found below `python_path` and, as everywhere in Airflow, in the DAGs folder itself.
    """
    environment = {
        **os.environ,
        "AIRFLOW__SECRETS__BACKEND": "recording_secrets.RecordingSecrets",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    command = [sys.executable, "-P", "-c", PARSER]
    with subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True) as parser:
        assert parser.stdin is not None
        assert parser.stdout is not None

        def request(folder: Path, *python_path: Path) -> dict[str, Any]:
            print(
                json.dumps([str(folder), [*map(str, python_path)]]), file=parser.stdin, flush=True
            )
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
    function = getattr(task, "python_callable", None)
    return inspect.getsource(function) if function else ""


def get_callbacks(callbacks: Any) -> list[Any]:
    """What a DAG calls back, which may be one function or several."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]


def test_all_dags_are_there_and_parsing_them_touches_nothing(parse: Parse) -> None:
    assert parse(ROOT / "dags", ROOT, ROOT / "plugins") == {
        "dags": sorted(DAG_IDS | UPKEEP),
        "errors": {},
        "heavy": [],
        "connections": [],
        "secrets": [],
    }


@pytest.mark.parametrize(
    ("line", "noticed_as"),
    [
        ("Variable.get('shop', default=None)", "secrets"),
        ("BaseHook.get_connection('polars_cloud')", "secrets"),
        ("import socket; socket.getaddrinfo('127.0.0.1', 9)", "connections"),
        ("import polars", "heavy"),
        ("import polars_cloud", "heavy"),
    ],
)
def test_a_dag_file_that_does_more_than_define_is_noticed(
    parse: Parse, tmp_path: Path, line: str, noticed_as: str
) -> None:
    (tmp_path / "careless.py").write_text(
        f"from airflow.sdk import BaseHook, DAG, Variable\n{line}"
    )
    assert parse(tmp_path)[noticed_as]


@pytest.mark.parametrize("dag_id", sorted(DAG_IDS))
def test_a_dag_is_named_like_its_file_and_says_what_it_is_for(
    dags: dict[str, DAG], dag_id: str
) -> None:
    dag = dags[dag_id]
    assert Path(dag.fileloc).stem == dag_id
    assert dag.doc_md
    if dag_id in KEPT:
        assert "What it costs" in dag.doc_md
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


@pytest.mark.parametrize("dag_id", sorted(DAG_IDS))
def test_every_task_that_makes_a_query_is_authenticated(dags: dict[str, DAG], dag_id: str) -> None:
    tasks = [task for task in dags[dag_id].tasks if task.task_id not in CLUSTER_TASKS]
    assert tasks
    for task in tasks:
        if dag_id not in KEPT and ".remote(" not in source_of(task):
            continue
        wrapper = task.python_callable.__code__
        assert Path(wrapper.co_filename) == ROOT / "include" / "auth.py", task.task_id


@pytest.mark.parametrize("dag_id", sorted(DAG_IDS | UPKEEP))
def test_every_task_that_waits_has_a_time_limit(dags: dict[str, DAG], dag_id: str) -> None:
    for task in dags[dag_id].tasks:
        if WAITS.search(source_of(task)) or task.task_id in CLUSTER_TASKS or dag_id in UPKEEP:
            assert task.execution_timeout is not None, task.task_id


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
def test_a_call_that_waits_is_told_from_one_that_does_not(line: str, waits: bool) -> None:
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
    dag = dags[dag_id]
    ends = [get_callbacks(each) for each in (dag.on_failure_callback, dag.on_success_callback)]
    if any(clean_up in callbacks for callbacks in ends):
        assert [callbacks[:1] for callbacks in ends] == [[clean_up], [clean_up]]


def test_preflight_runs_by_hand_alone_and_asks_before_it_spends(dags: dict[str, DAG]) -> None:
    dag = dags["preflight"]
    assert dag.schedule is None
    assert dag.params["spend"] is False
    assert dag.doc_md is not None
    assert "What it costs" in dag.doc_md
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
    assert "What it costs" in dag.doc_md
    assert "shop" not in dag.tags


def test_only_a_teardown_starts_regardless_of_how_others_ended(dags: dict[str, DAG]) -> None:
    for dag_id in KEPT:
        for task in dags[dag_id].tasks:
            assert task.is_teardown or task.trigger_rule == "all_success", task
