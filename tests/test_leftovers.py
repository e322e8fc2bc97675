"""`leftovers.py`: what a failed run has left is ended, within Airflow's time."""

import json
import os
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk import Context
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

from include.polars_remote import leftovers, releases
from include.polars_remote.client_internals import get_query_id
from include.polars_remote.clusters import use_cluster
from include.polars_remote.leftovers import clean_up
from include.polars_remote.queries import leave, submit
from include.polars_remote.shared_clusters import start_cluster as start_cluster_task
from polars_cloud_emulator.testing import RunningEmulator
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, kill

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}
FILE = "s3://your-bucket/results/one.parquet"
NOT_ENDED = [None, "scheduled", "queued", "running", "up_for_retry", "restarting", "deferred"]


@pytest.fixture(autouse=True)
def told(pc: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """The log tells what it tells in Airflow."""
    caplog.set_level("INFO", "include")


@pytest.fixture
def short_wind_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is running is soon taken for one on which somebody else's query runs."""
    monkeypatch.setattr(releases, "WIND_UP_SECONDS", 0.1)


@pytest.fixture
def context(start_try: StartTry, supervisor: Supervisor) -> Context:
    """What Airflow calls back with when the run has failed."""
    with start_try(task_id="other", scope=False) as ti:
        return ti.get_template_context()


def query_and_die(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    try_number: int = 1,
    cluster: dict[str, Any] = CLUSTER,
    **options: Any,
) -> Any:
    """A try that is killed in mid-query, and was the task's last."""

    def body() -> Iterator[Any]:
        with use_cluster(cluster) as ctx:
            emulator.add_fault("SubmitQuery", "query_hangs")
            yield submit(pl.LazyFrame({"x": [1]}).remote(ctx).single_node().sink_parquet, FILE)

    query = kill(body, try_number, **options)
    supervisor.states[options.get("run_id", "manual__1")][options.get("task_id", "run_query")] = (
        "failed"
    )
    return query


def start_cluster(start_try: StartTry, run_id: str = "manual__1") -> None:
    with start_try(task_id="start_cluster", run_id=run_id, scope=False):
        start_cluster_task.function(CLUSTER, "polars_cloud")


# What is ended


def test_a_failed_runs_queries_are_canceled_and_their_cluster_is_stopped(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    query_and_die(emulator, supervisor)
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_failed_runs_shared_cluster_is_stopped(
    emulator: RunningEmulator, supervisor: Supervisor, start_try: StartTry, context: Context
) -> None:
    start_cluster(start_try)
    query_and_die(emulator, supervisor)
    supervisor.states["manual__1"]["stop_cluster"] = "skipped"
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_what_a_killed_second_try_has_resumed_is_found(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    first = query_and_die(emulator, supervisor)
    second = query_and_die(emulator, supervisor, 2)
    assert get_query_id(first) == get_query_id(second)
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"]
    assert supervisor.variables == {}


def test_what_a_second_try_has_left_that_died_before_it_resumed_anything_is_found(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    def die_at_once() -> Iterator[None]:
        yield

    query_and_die(emulator, supervisor)
    kill(die_at_once, 2)
    supervisor.states["manual__1"]["run_query"] = "failed"
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"]


def test_a_query_whose_id_nobody_had_the_time_to_record_is_found(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    query_id = get_query_id(query_and_die(emulator, supervisor))
    for key, value in supervisor.variables.items():
        entry = json.loads(value)
        for record in entry.get("queries", {}).values():
            del record["query_id"], record["page"], record["submitted_at"]
        supervisor.variables[key] = json.dumps(entry)
    assert query_id not in str(supervisor.variables)
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"]


def test_the_tasks_of_a_mapped_one_are_all_found(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    for map_index in range(3):
        query_and_die(emulator, supervisor, map_index=map_index)
        supervisor.states["manual__1"][f"run_query_{map_index}"] = "failed"
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"] * 3
    assert supervisor.variables == {}


# What is left alone


@pytest.mark.parametrize("state", NOT_ENDED)
def test_everything_is_left_to_a_run_that_was_cleared(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    context: Context,
    caplog: pytest.LogCaptureFixture,
    state: str | None,
) -> None:
    query_and_die(emulator, supervisor)
    supervisor.states["manual__1"] |= {"other": "success", "run_query": state}
    clean_up(context)
    assert query_statuses(emulator) == ["InProgress"]
    assert cluster_statuses(emulator) == ["Running"]
    assert len(supervisor.variables) == 2
    assert "Run manual__1 goes on: nothing to clean up yet" in caplog.text


@pytest.mark.usefixtures("short_wind_up")
def test_nothing_is_canceled_that_is_submitted_after_the_look_at_the_ledger(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def clear_after_the_look(*_: object, run_ids: list[str], **__: object) -> Any:
        monkeypatch.undo()
        query_and_die(emulator, supervisor)
        return {run_id: {"run_query": "failed"} for run_id in run_ids}

    monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", clear_after_the_look)
    clean_up(context)
    assert query_statuses(emulator) == ["InProgress"]


def test_another_runs_queries_and_cluster_are_left_alone(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    query_and_die(emulator, supervisor)
    query_and_die(emulator, supervisor, run_id="manual__2")
    supervisor.states["manual__2"]["run_query"] = "running"
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled", "Scheduled"] or query_statuses(emulator) == [
        "Canceled",
        "InProgress",
    ]
    assert cluster_statuses(emulator) != ["Stopped"]
    assert len(supervisor.variables) == 2


@pytest.mark.usefixtures("short_wind_up")
def test_a_query_that_was_left_to_itself_runs_on(
    emulator: RunningEmulator, supervisor: Supervisor, start_try: StartTry, context: Context
) -> None:
    with start_try(), use_cluster(CLUSTER) as ctx:
        emulator.add_fault("SubmitQuery", "query_hangs")
        leave(submit(pl.LazyFrame({"x": [1]}).remote(ctx).single_node().sink_parquet, FILE))
    clean_up(context)
    assert query_statuses(emulator) == ["InProgress"]


def test_nothing_is_looked_for_where_nobody_answers_for_airflow() -> None:
    empty: Any = {}
    clean_up(empty)


def test_polars_cloud_is_not_called_where_nothing_was_left(
    emulator: RunningEmulator, context: Context
) -> None:
    before = len(emulator.journal())
    clean_up(context)
    assert len(emulator.journal()) == before


# The login


def test_the_login_is_that_of_the_task_that_has_left_it(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", os.environ["AIRFLOW_CONN_POLARS_CLOUD"])
    query_and_die(emulator, supervisor, conn_id="nightly")
    monkeypatch.delenv("AIRFLOW_CONN_POLARS_CLOUD")
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"]


def test_a_connection_that_is_refused_does_not_keep_the_others_from_being_cleaned_up(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", os.environ["AIRFLOW_CONN_POLARS_CLOUD"])
    query_and_die(emulator, supervisor, conn_id="nightly", task_id="nightly")
    other_cluster = {**CLUSTER, "name": "warehouse"}
    query_and_die(emulator, supervisor, cluster=other_cluster)
    monkeypatch.delenv("AIRFLOW_CONN_NIGHTLY")
    clean_up(context)
    assert query_statuses(emulator) == ["InProgress", "Canceled"]
    assert "Left by shop.nightly in run manual__1, and to be ended by hand" in caplog.text
    assert "'nightly' is missing" in caplog.text
    assert len(entries(supervisor, "task")) == 1


@pytest.mark.parametrize("operation", ["POST token", "GET user/me"])
def test_an_outage_at_the_login_is_waited_for(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context, operation: str
) -> None:
    query_and_die(emulator, supervisor)
    emulator.add_fault(operation, "http_error", status=503)
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"]


# Airflow's time


@pytest.fixture
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT", "3")
    monkeypatch.setattr(leftovers, "START_SECONDS", 1)


@pytest.mark.usefixtures("little_time")
@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        ("POST token", {"kind": "http_error", "status": 503}),
        ("GET compute/{id}", {"kind": "connection_reset"}),
        ("GetQueryStatus", {"kind": "stall"}),
        ("CancelQuery", {"kind": "connection_reset"}),
    ],
)
def test_a_clean_up_that_does_not_come_through_ends_in_time_and_names_what_is_left(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    context: Context,
    caplog: pytest.LogCaptureFixture,
    operation: str,
    fault: dict[str, Any],
) -> None:
    query_id = get_query_id(query_and_die(emulator, supervisor))
    [cluster] = emulator.state()["clusters"]
    emulator.add_fault(operation, times=1_000, **fault)
    began = time.monotonic()
    clean_up(context)
    assert time.monotonic() - began < 3
    left = "Left by shop.run_query in run manual__1, and to be ended by hand: "
    assert f"{left}query {query_id} for {FILE} on cluster {cluster['id']}" in caplog.text
    assert len(entries(supervisor, "task")) == 1


@pytest.mark.usefixtures("little_time")
def test_a_clean_up_makes_use_of_the_time_that_it_has(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    query_and_die(emulator, supervisor)
    logins = calls(emulator, "token")
    emulator.add_fault("POST token", "http_error", status=503, times=1_000)
    clean_up(context)
    assert calls(emulator, "token") - logins >= 3
