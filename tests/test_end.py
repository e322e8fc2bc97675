"""`ownership/end.py`: orphans are ended within the time that Airflow allows."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import polars as pl
import pytest
from airflow.sdk import Context
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import clean_up, detach, use_cluster
from polars_remote.cloud import session
from polars_remote.cloud.client import ClusterBill, get_cluster_bill, get_query_id
from polars_remote.clusters import start_for_run
from polars_remote.ownership import costs, end, record
from polars_remote.ownership.end import end_orphans, end_task_entry
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, kill

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}
FILE = "s3://your-bucket/results/one.parquet"
ACTIVE = [None, "scheduled", "queued", "running", "up_for_retry", "restarting", "deferred"]

pytestmark = pytest.mark.usefixtures("pc")


@pytest.fixture(autouse=True)
def own_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the test's logins at its end."""
    monkeypatch.setattr(session, "_login", session._Login())


@pytest.fixture
def short_wind_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only briefly for a cluster to become idle."""
    monkeypatch.setattr(end, "IDLE_WAIT_SECONDS", 0.1)


@pytest.fixture
def context(start_try: StartTry, supervisor: Supervisor) -> Context:
    """Context that Airflow passes to the callback of a failed run."""
    with start_try(task_id="other", scope=False) as ti:
        return ti.get_template_context()


@pytest.fixture
def run(context: Context) -> str:
    """The run of `context`, as in the record's keys."""
    return record.digest("shop", context["run_id"])


def query_and_die(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    try_number: int = 1,
    cluster: dict[str, Any] = CLUSTER,
    state: str | None = "failed",
    **options: Any,
) -> Any:
    """Kill a try while its query runs, and set the task's state, `failed` by default."""

    def body() -> Iterator[Any]:
        with use_cluster(cluster) as ctx:
            emulator.add_fault("SubmitQuery", "query_hangs")
            yield submit(ctx)

    query = kill(body, try_number, **options)
    session._login = session._Login()  # orphans are ended in another process
    set_state(supervisor, state, **options)
    return query


def set_state(
    supervisor: Supervisor,
    state: str | None,
    run_id: str = "manual__1",
    task_id: str = "run_query",
    map_index: int = -1,
    **_: Any,
) -> None:
    name = task_id if map_index < 0 else f"{task_id}_{map_index}"
    supervisor.states[run_id][name] = state


def submit(ctx: Any) -> Any:
    return pl.LazyFrame({"x": [1]}).remote(ctx).single_node().sink_parquet(FILE)


def start_cluster(start_try: StartTry, run_id: str = "manual__1") -> None:
    with start_try(task_id="start_cluster", run_id=run_id, scope=False):
        start_for_run(CLUSTER, "polars_cloud")


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
        for query in entry.get("queries", {}).values():
            del query["query_id"], query["page"], query["submitted_at"]
        supervisor.variables[key] = json.dumps(entry)
    assert query_id not in str(supervisor.variables)
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"]


def test_the_tasks_of_a_mapped_one_are_all_found(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    for map_index in range(3):
        query_and_die(emulator, supervisor, map_index=map_index)
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled"] * 3
    assert supervisor.variables == {}


# What is left alone


@pytest.mark.parametrize("state", ACTIVE)
def test_everything_is_left_to_a_task_that_was_cleared(
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
    assert (
        "shop.run_query in run manual__1 is active: its queries and clusters keep running"
        in caplog.text
    )


def test_a_task_that_has_ended_is_cleaned_up_although_another_of_its_run_is_active(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    other_cluster = {**CLUSTER, "name": "warehouse"}
    query_and_die(emulator, supervisor)
    query_and_die(emulator, supervisor, cluster=other_cluster, task_id="later", state="running")
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled", "InProgress"]
    assert cluster_statuses(emulator) == ["Stopped", "Running"]
    assert [entry["owner"][2] for entry in entries(supervisor, "task")] == ["later"]
    assert [entry["owner"][2] for entry in entries(supervisor, "cluster")] == ["later"]


@pytest.mark.usefixtures("short_wind_up")
def test_nothing_is_canceled_that_is_submitted_after_the_look_at_the_record(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def clear_after_the_look(*_: object, run_ids: list[str], **__: object) -> Any:
        monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", get_task_states)
        query_and_die(emulator, supervisor, 2, clear_number=1)
        eventually(lambda: query_statuses(emulator) == ["Canceled", "InProgress"])
        return {run_id: {"run_query": "failed"} for run_id in run_ids}

    get_task_states = RuntimeTaskInstance.get_task_states
    query_and_die(emulator, supervisor)
    monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", clear_after_the_look)
    clean_up(context)
    assert query_statuses(emulator) == ["Canceled", "InProgress"]
    [entry] = entries(supervisor, "task")
    assert entry["clear_number"] == 1


def test_another_runs_queries_and_cluster_are_left_alone(
    emulator: RunningEmulator, supervisor: Supervisor, context: Context
) -> None:
    query_and_die(emulator, supervisor)
    query_and_die(emulator, supervisor, run_id="manual__2", state="running")
    clean_up(context)
    first, second = query_statuses(emulator)
    assert first == "Canceled"
    assert second in ("Scheduled", "InProgress")
    assert cluster_statuses(emulator) != ["Stopped"]
    assert [entry["owner"][1] for entry in entries(supervisor, "task")] == ["manual__2"]
    uses = [(each["owner"][1], bool(each["until"])) for each in entries(supervisor, "cluster")]
    assert sorted(uses) == [("manual__1", True), ("manual__2", False)]


@pytest.mark.usefixtures("short_wind_up")
def test_a_query_that_was_detached_runs_on(
    emulator: RunningEmulator, start_try: StartTry, context: Context
) -> None:
    with start_try(), use_cluster(CLUSTER) as ctx:
        emulator.add_fault("SubmitQuery", "query_hangs")
        detach(submit(ctx))
    clean_up(context)
    assert query_statuses(emulator) == ["InProgress"]


def test_nothing_is_ended_without_a_supervisor() -> None:
    empty: Any = {}
    clean_up(empty)
    clean_up()


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
    left = [each for each in caplog.messages if each.startswith("Could not end query ")]
    assert len(left) == 1
    assert " of shop.nightly in run manual__1: " in left[0]
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


# All runs


def leave_in_two_runs(emulator: RunningEmulator, supervisor: Supervisor) -> None:
    """Create an ended and an active task in each of two runs, each on its own cluster."""
    for run_id in ("manual__1", "manual__2"):
        for task_id, state in (("ended", "failed"), ("active", "running")):
            options = {"task_id": task_id, "state": state, "run_id": run_id}
            cluster = {**CLUSTER, "name": f"{task_id}-{run_id}"}
            query_and_die(emulator, supervisor, cluster=cluster, **options)


def owners(supervisor: Supervisor, kind: str) -> set[tuple[str, str]]:
    """Return task and run of each owner on record."""
    return {(entry["owner"][2], entry["owner"][1]) for entry in entries(supervisor, kind)}


def test_orphans_of_all_runs_are_ended_and_active_tasks_left_alone(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    leave_in_two_runs(emulator, supervisor)
    assert end_orphans() == []
    assert query_statuses(emulator) == ["Canceled", "InProgress"] * 2
    assert cluster_statuses(emulator) == ["Stopped", "Running"] * 2
    for kind in ("task", "cluster"):
        active = {("active", "manual__1"), ("active", "manual__2")}
        assert owners(supervisor, kind) == active


def test_orphans_of_one_run_are_ended_and_other_runs_left_alone(
    emulator: RunningEmulator, supervisor: Supervisor, run: str
) -> None:
    leave_in_two_runs(emulator, supervisor)
    assert end_orphans(run) == []
    assert query_statuses(emulator) == ["Canceled"] + ["InProgress"] * 3
    assert cluster_statuses(emulator) == ["Stopped"] + ["Running"] * 3
    for kind in ("task", "cluster"):
        assert ("ended", "manual__1") not in owners(supervisor, kind)
        assert len(owners(supervisor, kind)) == 3


def test_a_shared_cluster_is_an_orphan_when_its_run_has_ended(
    emulator: RunningEmulator, supervisor: Supervisor, start_try: StartTry
) -> None:
    start_cluster(start_try)
    supervisor.states["manual__1"]["run_query"] = "running"
    assert end_orphans() == []
    assert cluster_statuses(emulator) == ["Idle"]
    supervisor.states["manual__1"]["run_query"] = "success"
    assert end_orphans() == []
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_ending_orphans_does_not_wait_until_their_cluster_has_stopped(
    emulator: RunningEmulator, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def get_bill_while_stopping(cluster_id: str, workspace: Any) -> ClusterBill:
        """On the emulator, a stop takes no time."""
        asked.append(cluster_id)
        bill = get_cluster_bill(cluster_id, workspace)
        return bill._replace(status="STOPPING", stopped_at=None)

    monkeypatch.setattr(costs, "get_cluster_bill", get_bill_while_stopping)
    query_and_die(emulator, supervisor)
    assert end_orphans() == []
    assert cluster_statuses(emulator) == ["Stopped"]
    assert len(asked) == 1


def test_an_orphan_stays_on_record_for_the_cost_while_a_task_of_its_run_uses_the_cluster(
    emulator: RunningEmulator, supervisor: Supervisor, start_try: StartTry
) -> None:
    # In this order the task that ends sees them.
    killed, active = sorted(("one", "two"), key=lambda name: record.digest(name, -1, False))
    with start_try(task_id=active), use_cluster(CLUSTER):
        query_and_die(emulator, supervisor, task_id=killed)
        with start_try(task_id="ending"), use_cluster(CLUSTER):
            pass
        assert query_statuses(emulator) == ["Canceled"]
        assert (killed, "manual__1") in owners(supervisor, "cluster")
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_task_that_somebody_watches_is_no_orphan(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    query_and_die(emulator, supervisor)
    [key] = (key for key in supervisor.variables if key.startswith(record.TASKS))
    supervisor.states["manual__1"]["run_query"] = "running"
    assert end_orphans(excluding={key}) == []
    assert query_statuses(emulator) == ["InProgress"]


def test_clean_up_without_a_context_ends_the_orphans_of_all_runs(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    leave_in_two_runs(emulator, supervisor)
    clean_up()
    assert query_statuses(emulator) == ["Canceled", "InProgress"] * 2
    assert cluster_statuses(emulator) == ["Stopped", "Running"] * 2


def test_what_could_not_be_ended_is_returned_stays_on_record_and_is_ended_later(
    emulator: RunningEmulator, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = os.environ["AIRFLOW_CONN_POLARS_CLOUD"]
    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", secret)
    other_cluster = {**CLUSTER, "name": "warehouse"}
    query_and_die(emulator, supervisor, conn_id="nightly", task_id="nightly")
    query_and_die(emulator, supervisor, cluster=other_cluster)
    monkeypatch.delenv("AIRFLOW_CONN_NIGHTLY")
    left = end_orphans()
    assert query_statuses(emulator) == ["InProgress", "Canceled"]
    assert cluster_statuses(emulator) == ["Running", "Stopped"]
    for kind in ("task", "cluster"):
        assert owners(supervisor, kind) == {("nightly", "manual__1")}
    assert {str(each.owner) for each in left} == {"shop.nightly in run manual__1"}
    assert all("'nightly' is missing" in each.reason for each in left)
    assert any(each.what.startswith("query ") for each in left)

    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", secret)
    assert end_orphans() == []
    assert query_statuses(emulator) == ["Canceled"] * 2
    assert cluster_statuses(emulator) == ["Stopped"] * 2
    assert supervisor.variables == {}


@pytest.mark.parametrize("value", ["not JSON", "[]", "{}", '{"owner": ["shop"]}', '{"owner": []}'])
def test_an_entry_that_nobody_can_read_keeps_no_other_from_being_ended(
    emulator: RunningEmulator, supervisor: Supervisor, value: str
) -> None:
    query_and_die(emulator, supervisor)
    unreadable = [f"{record.TASKS}0/0/0", f"{record.CLUSTERS}0/0/0"]
    supervisor.variables |= dict.fromkeys(unreadable, value)
    left = end_orphans()
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert sorted(supervisor.variables) == sorted(unreadable)
    for key in unreadable:
        assert any(key in str(each) for each in left)


# A deferred task


def test_the_entry_of_a_deferred_task_is_ended_with_its_queries_and_its_clusters(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    query_and_die(emulator, supervisor, state="deferred")
    [key] = (key for key in supervisor.variables if key.startswith(record.TASKS))
    assert end_task_entry(key) == []
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}
    assert end_task_entry(key) == []


def test_the_entry_of_a_deferred_task_is_left_alone_once_a_later_try_owns_its_queries(
    emulator: RunningEmulator, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    query_and_die(emulator, supervisor, state="deferred")
    [key] = (key for key in supervisor.variables if key.startswith(record.TASKS))
    earlier = supervisor.variables[key]
    query_and_die(emulator, supervisor, 2, state="running")
    supervisor.variables[key] = earlier  # read before the later try erased the entry
    assert end_task_entry(key) == []
    assert "A later try of shop.run_query in run manual__1 has adopted its queries" in caplog.text
    assert query_statuses(emulator) == ["InProgress"]
    assert cluster_statuses(emulator) == ["Running"]


# Releases


def write_as_release_before(supervisor: Supervisor) -> None:
    """Rewrite each entry in the format of the first release."""
    task = ["owner", "conn_id", "clear_number", "over", "queries", "kept", "waits_for", "deadline"]
    query = ["cluster_id", "manifest", "known", "query_id", "page", "submitted_at", "try_number"]
    use = ["owner", "manifest", "conn_id"]
    for key, value in supervisor.variables.items():
        entry = json.loads(value)
        if key.startswith(record.TASKS):
            old = {name: entry[name] for name in task}
            old["queries"] = {
                destination: {name: each[name] for name in query if name in each}
                for destination, each in entry["queries"].items()
            }
        else:
            old = {name: entry[name] for name in use}
        supervisor.variables[key] = json.dumps(old)


@pytest.mark.parametrize("has_id", [True, False])
def test_what_the_release_before_has_left_is_ended(
    emulator: RunningEmulator, supervisor: Supervisor, has_id: bool
) -> None:
    query_and_die(emulator, supervisor)
    write_as_release_before(supervisor)
    if not has_id:
        [key] = (key for key in supervisor.variables if key.startswith(record.TASKS))
        entry = json.loads(supervisor.variables[key])
        for name in ("query_id", "page", "submitted_at"):
            del entry["queries"][FILE][name]
        supervisor.variables[key] = json.dumps(entry)
    assert end_orphans() == []
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_query_of_the_release_before_is_resumed(
    emulator: RunningEmulator, supervisor: Supervisor, start_try: StartTry
) -> None:
    first = query_and_die(emulator, supervisor, state="up_for_retry")
    write_as_release_before(supervisor)
    with start_try(2), use_cluster(CLUSTER) as ctx:
        second = submit(ctx)
        assert get_query_id(second) == get_query_id(first)
        second.cancel()
        assert second.await_result().status.name == "CANCELED"
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_what_a_later_release_has_added_stays_in_an_entry_that_could_not_be_ended(
    emulator: RunningEmulator, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    query_and_die(emulator, supervisor)
    for key, value in supervisor.variables.items():
        supervisor.variables[key] = json.dumps(json.loads(value) | {"added": "later"})
    monkeypatch.delenv("AIRFLOW_CONN_POLARS_CLOUD")
    assert end_orphans() != []
    for kind in ("task", "cluster"):
        assert [entry["added"] for entry in entries(supervisor, kind)] == ["later"]


# Airflow's time


TIMEOUT = 6
"""Seconds that Airflow allows a callback in these tests; half of them are for ending orphans."""


@pytest.fixture
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT", str(TIMEOUT))
    monkeypatch.setattr(end, "PARSE_SECONDS", TIMEOUT / 2)


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
def test_a_clean_up_without_an_answer_ends_in_time_and_names_the_orphans(
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
    assert time.monotonic() - began < TIMEOUT
    left = f"Could not end query {query_id} for {FILE} on cluster {cluster['id']}"
    assert f"{left} of shop.run_query in run manual__1: " in caplog.text
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
