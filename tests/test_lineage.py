"""Airflow's OpenLineage provider reports the datasets of a task's queries."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from include.shop import DATA
from polars_cloud_emulator.testing import RunningEmulator
from polars_remote import use_cluster
from polars_remote.ownership.lineage import merge_files, name_dataset, without_pattern
from polars_remote.ownership.record import TaskRecord
from tests.tries import StartTry, Supervisor

BUCKET = "s3://your-bucket"
PROVIDER = "airflow.providers.openlineage"
CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}

RUN_A_DAG = """
import sys

from airflow.dag_processing.dagbag import DagBag

from polars_remote.waiting import deferral

deferral.IN_WORKER_SECONDS = deferral.LONGEST_RESUME_DELAY = 0.0
print("the run ended:", DagBag().dags[sys.argv[1]].test().state)
"""

PLAIN_TASKS = """
from airflow.sdk import dag, task

from include.auth import authenticate
from polars_remote import use_cluster

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4, "cluster_size": 2}


@dag(schedule=None)
def plain_tasks():
    @task
    @authenticate
    def succeeds():
        import polars as pl

        table = pl.scan_parquet("s3://your-bucket/sales/*.parquet")
        both = [
            table.head(rows).sink_parquet(f"s3://your-bucket/plain/{rows}", lazy=True)
            for rows in (1, 2)
        ]
        with use_cluster(CLUSTER) as ctx:
            temporary = table.head(3).remote(ctx).execute()
            again = pl.scan_parquet(temporary.location).remote(ctx)
            again.sink_parquet("s3://your-bucket/plain/folder/").await_result()
            pl.collect_all(both, lazy=True).remote(ctx).execute()

    @task
    @authenticate
    def fails():
        import polars as pl

        stock = pl.scan_parquet("s3://your-bucket/inventory/")
        returns = pl.scan_parquet("s3://your-bucket/returns/").select("no such column")
        with use_cluster(CLUSTER) as ctx:
            stock.remote(ctx).single_node().execute()
            returns.remote(ctx).single_node().sink_parquet("s3://your-bucket/x").await_result()

    @task
    def has_no_query():
        pass

    succeeds(), fails(), has_no_query()


plain_tasks()
"""

Event = dict[str, Any]


def run_dag(dag_id: str, folder: Path, **variables: str) -> dict[str, list[Event]]:
    """Run the DAG, and return the events by task id."""
    log = folder / "lineage.ndjson"
    transport = {"type": "file", "log_file_path": str(log), "append": True}
    ran = subprocess.run(
        [sys.executable, "-c", RUN_A_DAG, dag_id],
        env={**os.environ, **variables, "AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps(transport)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "the run ended:" in ran.stdout, ran.stdout + ran.stderr
    events = defaultdict(list)
    for line in log.read_text().splitlines():
        event = json.loads(line)
        events[event["job"]["name"].removeprefix(f"{dag_id}.")].append(event)
    return events


def last(events: list[Event], kind: str) -> Event:
    """Return the last event, and check that it is the only one of its kind."""
    assert [event["eventType"] for event in events].count(kind) == 1
    assert events[-1]["eventType"] == kind
    return events[-1]


def datasets(event: Event, side: str) -> list[str]:
    return sorted(f"{each['namespace']} {each['name']}" for each in event[side])


def rows(event: Event) -> list[int | None]:
    facets = [each.get("outputFacets") or {} for each in event["outputs"]]
    return [each.get("outputStatistics", {}).get("rowCount") for each in facets]


@pytest.mark.dag("complete_pipeline")
@pytest.mark.usefixtures("airflow_db")
def test_deferred_tasks_report_the_tables_and_rows_of_their_queries_once(
    emulator: RunningEmulator, tmp_path: Path
) -> None:
    emulator.add_fault("SubmitQuery", "query_takes", seconds=2, times=4)
    events = run_dag("complete_pipeline", tmp_path)
    [run] = events["complete_pipeline"]
    temporary = []
    for table in ("sales", "inventory", "returns"):
        event = last(events[f"transform_{table}"], "COMPLETE")
        assert datasets(event, "inputs") == [f"{BUCKET} {table}"]
        temporary += datasets(event, "outputs")
        assert rows(event) == [pl.read_parquet(uri(event)).height]
        assert event["run"]["facets"]["parent"]["run"]["runId"] == run["run"]["runId"]
    assert len(events["transform_sales"]) == 3  # a resumed task sends another start event
    report = last(events["build_report"], "COMPLETE")
    assert datasets(report, "inputs") == sorted(temporary)
    assert uri(report).startswith(f"{DATA}/reports/daily/")
    assert rows(report) == [pl.read_parquet(uri(report)).height]


def uri(event: Event) -> str:
    [output] = event["outputs"]
    return f"{output['namespace']}/{output['name']}"


@pytest.mark.usefixtures("airflow_db", "emulator")
def test_plain_tasks_report_the_queries_that_they_have_waited_for(tmp_path: Path) -> None:
    (tmp_path / "plain_tasks.py").write_text(PLAIN_TASKS)
    events = run_dag("plain_tasks", tmp_path, AIRFLOW__CORE__DAGS_FOLDER=str(tmp_path))
    event = last(events["succeeds"], "COMPLETE")
    [temporary] = {*datasets(event, "inputs")} - {f"{BUCKET} sales"}
    assert temporary.startswith("s3://polars-cloud-temporary ")
    plain = [f"{BUCKET} plain/{name}" for name in ("1", "2", "folder")]
    assert datasets(event, "outputs") == sorted([*plain, temporary])
    names = [output["name"] for output in event["outputs"]]
    counts = dict(zip(names, rows(event), strict=True))
    assert counts["plain/folder"] == 3
    assert counts["plain/1"] is counts["plain/2"] is None  # the service reports the sum of both

    event = last(events["fails"], "FAIL")
    assert datasets(event, "inputs") == [f"{BUCKET} inventory", f"{BUCKET} returns"]
    [output] = datasets(event, "outputs")
    assert output.startswith("s3://polars-cloud-temporary ")

    event = last(events["has_no_query"], "COMPLETE")
    assert (event["inputs"], event["outputs"]) == ([], [])


@pytest.mark.usefixtures("pc", "emulator")
@pytest.mark.parametrize("is_used", [True, False])
def test_the_record_holds_datasets_only_where_the_provider_is_used(
    supervisor: Supervisor, start_try: StartTry, monkeypatch: pytest.MonkeyPatch, is_used: bool
) -> None:
    monkeypatch.delitem(sys.modules, PROVIDER, raising=False)
    if is_used:
        monkeypatch.setitem(sys.modules, PROVIDER, ModuleType(PROVIDER))
    imported = {*sys.modules}
    query: Any = pl.scan_parquet(f"{BUCKET}/sales/")
    with start_try(), use_cluster(CLUSTER) as ctx:
        query.remote(ctx).sink_parquet(f"{BUCKET}/folder/").await_result()
        stored = [
            json.loads(value) for key, value in supervisor.variables.items() if "/task/" in key
        ]
    [task] = map(TaskRecord.load, stored)
    [record] = task.queries.values()
    if is_used:
        assert [tuple(each) for each in record.inputs or []] == [(BUCKET, "sales")]
        assert [tuple(each) for each in record.outputs or []] == [(BUCKET, "folder")]
    else:
        assert not {"inputs", "outputs"} & record.dump().keys()
        assert not [name for name in {*sys.modules} - imported if "lineage" in name]


@pytest.mark.parametrize(
    ("uri", "dataset"),
    [
        ("s3://b/sales/", ("s3://b", "sales")),
        ("s3a://b/sales/a#b?.parquet", ("s3://b", "sales/a#b?.parquet")),
        ("s3://b/", ("s3://b", "/")),
        ("gcs://b/x", ("gs://b", "x")),
        (
            "abfss://c@a.dfs.core.windows.net/x/y",
            ("abfss://c@a.dfs.core.windows.net", "x/y"),
        ),
        ("https://user:secret@host:80/x.csv?signature=s3://b", ("https://host:80", "x.csv")),
        ("file:///x/y", ("file", "/x/y")),
        ("/x/y/", ("file", "/x/y")),
    ],
)
def test_a_dataset_has_the_name_of_openlineages_naming_page(
    uri: str, dataset: tuple[str, str]
) -> None:
    assert name_dataset(uri) == dataset


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("sales/2026-*/x.parquet", "sales"),
        ("sales/**/*.parquet", "sales"),
        ("sales/x[0-9].parquet", "sales"),
        ("*.parquet", "/"),
        ("sales/x.parquet", "sales/x.parquet"),
    ],
)
def test_a_scan_with_wildcards_is_named_by_its_folder(name: str, folder: str) -> None:
    assert without_pattern(name) == folder


def test_several_files_of_a_folder_are_named_by_the_folder() -> None:
    files = [f"s3://b/x/{number}.parquet" for number in range(1_000)]
    assert merge_files([*files, "s3://b/y/1.parquet"]) == ["s3://b/x", "s3://b/y/1.parquet"]
