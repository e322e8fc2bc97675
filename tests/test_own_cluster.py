"""Clusters of your own: all promises about queries hold, and no task starts or stops them."""

import asyncio
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from traceback import TracebackException
from typing import Any

import polars as pl
import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.providers.openlineage.plugins import macros
from airflow.sdk import DAG, DagRunState
from airflow.sdk.exceptions import AirflowFailException

from local_airflow import ROOT
from polars_cloud_emulator.testing import RunningEmulator, running_emulator
from polars_remote import detach, ensure_manifest, shared_cluster, use_cluster
from polars_remote.errors import ClusterRefusedError, LoginRefusedError
from polars_remote.ownership.end import end_orphans
from polars_remote.waiting import deferral, progress
from polars_remote.waiting.in_triggerer import cancel_queries
from tests.observed import calls, entries, query_statuses, variables
from tests.tries import StartTry, Supervisor, kill
from tests.two_rows import FILE, SECONDS, TWO_ROWS, defer, first_event, submit, submit_and_freeze

MINUTE = timedelta(minutes=1)


@pytest.fixture(scope="module")
def running_own() -> Iterator[RunningEmulator]:
    with running_emulator(on_premises=True) as emulator:
        yield emulator


@pytest.fixture
def own(
    running_own: RunningEmulator,
    emulator: RunningEmulator,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[RunningEmulator]:
    """A cluster of your own and its Connection; no call goes to Polars Cloud."""
    connection = running_own.environment["AIRFLOW_CONN_POLARS_CLOUD"]
    monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", connection)
    yield running_own
    assert emulator.journal() == []
    running_own.reset()


@pytest.fixture
def cluster(own: RunningEmulator) -> dict[str, str]:
    return {"uri": own.environment["POLARS_CLUSTER_URI"]}


def runs(own: RunningEmulator) -> bool:
    """Return whether the cluster that ran at the start still runs."""
    [cluster] = own.state()["clusters"]
    return cluster["stopped_at"] is None


def test_a_query_is_on_record_and_labeled_and_the_cluster_runs_on(
    own: RunningEmulator, cluster: dict[str, str], start_try: StartTry, supervisor: Supervisor
) -> None:
    own.add_fault("SubmitQuery", "query_takes", seconds=60)
    with start_try(), use_cluster(cluster) as ctx:
        query = submit(ctx)
        [task] = entries(supervisor, "task")
        assert list(task["queries"]) == [FILE]
        own.advance_clock(MINUTE)
        result = query.await_result()
    assert (result.location, result.n_rows_total) == ([FILE], 2)
    assert own.state()["queries"][0]["labels"][0] == "dag=shop"
    assert runs(own)
    assert supervisor.variables == {}


def test_a_query_without_a_context_runs_on_the_cluster_of_the_block(
    own: RunningEmulator, cluster: dict[str, str], start_try: StartTry
) -> None:
    with start_try(), use_cluster(cluster):
        remote: Any = TWO_ROWS.remote()
        assert remote.execute().n_rows_total == 2
    assert query_statuses(own) == ["Success"]


def test_the_next_try_of_a_killed_worker_resumes_the_query(
    own: RunningEmulator, cluster: dict[str, str], start_try: StartTry
) -> None:
    own.add_fault("SubmitQuery", "query_takes", seconds=60)
    kill(lambda: submit_and_freeze(cluster))
    with start_try(2), use_cluster(cluster) as ctx:
        query = submit(ctx)
        own.advance_clock(MINUTE)
        assert query.await_result().location == [FILE]
    assert query_statuses(own) == ["Success"]


def test_a_task_that_fails_cancels_its_query(
    own: RunningEmulator, cluster: dict[str, str], start_try: StartTry, supervisor: Supervisor
) -> None:
    own.add_fault("SubmitQuery", "query_hangs")
    with start_try(raises=ZeroDivisionError), use_cluster(cluster) as ctx:
        submit(ctx)
        raise ZeroDivisionError
    assert query_statuses(own) == ["Canceled"]
    assert runs(own)
    assert supervisor.variables == {}


def test_the_orphan_of_a_task_that_has_ended_is_canceled(
    own: RunningEmulator, cluster: dict[str, str], supervisor: Supervisor
) -> None:
    own.add_fault("SubmitQuery", "query_hangs")
    kill(lambda: submit_and_freeze(cluster))
    supervisor.states["manual__1"]["run_query"] = "failed"
    assert end_orphans() == []
    assert query_statuses(own) == ["Canceled"]
    assert runs(own)
    assert supervisor.variables == {}


def test_a_query_that_fails_raises_its_own_exception(
    cluster: dict[str, str], start_try: StartTry
) -> None:
    error = pl.exceptions.ColumnNotFoundError
    with start_try(raises=error, match="nope"), use_cluster(cluster) as ctx:
        submit(ctx, frame=TWO_ROWS.select("nope")).await_result()


def test_a_query_that_the_cluster_has_failed_is_not_submitted_again(
    own: RunningEmulator, cluster: dict[str, str], start_try: StartTry
) -> None:
    own.add_fault("SubmitQuery", "worker_killed")
    with start_try(raises=RuntimeError, match="died"), use_cluster(cluster) as ctx:
        submit(ctx).await_result()
    assert query_statuses(own) == ["Failed"]


def test_an_outage_is_survived(
    own: RunningEmulator, cluster: dict[str, str], start_try: StartTry
) -> None:
    for operation in ("SubmitQuery", "GetQueryStatus"):
        own.add_fault(operation, "grpc_error", code="UNAVAILABLE", message="down")
    with start_try(), use_cluster(cluster) as ctx:
        query = submit(ctx)
        query.get_status()
        query.await_result()
    assert own.state()["faults"] == []


def test_a_submission_whose_reply_is_lost_is_submitted_again(
    own: RunningEmulator, cluster: dict[str, str], start_try: StartTry
) -> None:
    own.add_fault("SubmitQuery", "answer_lost")
    with start_try(), use_cluster(cluster) as ctx:
        submit(ctx).await_result()
    assert calls(own, "SubmitQuery") == 2


def test_a_detached_query_runs_on(
    own: RunningEmulator, cluster: dict[str, str], start_try: StartTry
) -> None:
    own.add_fault("SubmitQuery", "query_hangs")
    with start_try(), use_cluster(cluster) as ctx:
        detach(submit(ctx))
    assert query_statuses(own) == ["InProgress"]


def test_a_deferred_task_gets_the_result_that_its_trigger_has_seen(
    own: RunningEmulator,
    cluster: dict[str, str],
    supervisor: Supervisor,
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deferral, "LONGEST_RESUME_DELAY", 0.0)
    trigger = defer(own, cluster, supervisor, start_try)
    own.advance_clock(MINUTE)
    assert first_event(trigger) == {"results": {FILE: {"location": [FILE], "rows": 2}}}


def test_a_trigger_cancels_the_query_of_a_task_that_is_out_of_time(
    own: RunningEmulator, cluster: dict[str, str], supervisor: Supervisor, start_try: StartTry
) -> None:
    trigger = defer(own, cluster, supervisor, start_try)
    asyncio.run(asyncio.wait_for(cancel_queries(trigger.conn_id, trigger.queries), SECONDS))
    assert query_statuses(own) == ["Canceled"]


def test_the_log_shows_the_age_of_a_query_if_the_observatory_is_unreachable(
    own: RunningEmulator,
    cluster: dict[str, str],
    start_try: StartTry,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "LOG_AFTER_SECONDS", (0.1, 1800))
    monkeypatch.setenv("POLARS_TIMEOUT_MS", "2000")
    own.add_fault("SubmitQuery", "query_hangs")
    with start_try(raises=TimeoutError), use_cluster(cluster) as ctx:
        submit(ctx).await_result()
    assert "INPROGRESS after 0 min" in caplog.text


@pytest.mark.parametrize("provider", ["works", "is missing", "lacks a macro"])
def test_a_query_names_its_task_and_the_tasks_run_for_lineage(
    own: RunningEmulator,
    cluster: dict[str, str],
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
    provider: str,
) -> None:
    if provider == "is missing":
        monkeypatch.setitem(sys.modules, macros.__name__, None)
    elif provider == "lacks a macro":  # as any error in it, it refuses no query
        monkeypatch.delattr(macros, "lineage_run_id")
    with start_try() as ti, use_cluster(cluster) as ctx:
        run_id = str(macros.lineage_run_id(ti) if provider == "works" else ti.id)  # type: ignore[arg-type]
        submit(ctx).await_result()
        given: Any = TWO_ROWS.remote(ctx)
        given.with_lineage(job_namespace="mine", job_name="own").execute()
    first, second = (query["lineage"] for query in own.state()["queries"])
    assert first == {
        "job_namespace": "default",
        "job_name": "shop.run_query.query",
        "parent_run_id": run_id,
        "parent_job_namespace": "default",
        "parent_job_name": "shop.run_query",
    }
    assert second["job_name"] == "own"


def test_headers_that_the_cluster_does_not_accept_are_an_error_that_is_not_retried(
    own: RunningEmulator,
    cluster: dict[str, str],
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = json.loads(own.environment["AIRFLOW_CONN_POLARS_CLOUD"])
    connection["extra"]["headers"] = {"authorization": "Bearer stranger"}
    monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", json.dumps(connection))
    with (
        start_try(raises=LoginRefusedError, match="did not accept the headers"),
        use_cluster(cluster) as ctx,
    ):
        submit(ctx)
    assert own.state()["queries"] == []


def test_an_extra_of_another_form_is_refused(
    own: RunningEmulator,
    cluster: dict[str, str],
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = {"conn_type": "http", "extra": {"headers": ["authorization"]}}
    monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", json.dumps(connection))
    with start_try(raises=LoginRefusedError, match="must have the form"), use_cluster(cluster):
        pass


@pytest.mark.usefixtures("own")
def test_a_connection_to_own_clusters_starts_none_on_polars_cloud(start_try: StartTry) -> None:
    with (
        start_try(raises=LoginRefusedError, match="only be used for clusters of your own"),
        use_cluster({"name": "shop", "cpus": 2, "memory": 4}),
    ):
        pass


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"uri": "scheduler:5051"}, "is its scheduler's address"),
        ({"uri": ""}, "is its scheduler's address"),
        ({"uri": "https://name:secret@scheduler"}, "without a login"),
        ({"uri": "https://scheduler", "cpus": 2}, "does not take cpus"),
        ({"uri": "https://scheduler", "name": "shop"}, "does not take name"),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_uri_that_is_none_and_options_of_other_clusters_are_refused(
    start_try: StartTry, wrong: dict[str, Any], problem: str
) -> None:
    with start_try(raises=ClusterRefusedError, match=problem), use_cluster(wrong):
        pass
    assert issubclass(ClusterRefusedError, AirflowFailException)


@pytest.mark.usefixtures("own")
def test_an_own_cluster_has_no_manifest_and_no_task_that_starts_or_stops_it(
    cluster: dict[str, str], start_try: StartTry
) -> None:
    with start_try():
        ensure_manifest(cluster)
    with DAG("own", schedule=None) as dag, shared_cluster(cluster):
        pass
    assert dag.tasks == []


@pytest.mark.dag("complete_pipeline")
@pytest.mark.usefixtures("airflow_db")
def test_the_pipeline_runs_on_an_own_cluster_when_its_constant_names_it(
    own: RunningEmulator, cluster: dict[str, str], tmp_path: Path
) -> None:
    source = (ROOT / "dags" / "complete_pipeline.py").read_text()
    before, _, rest = source.partition("CLUSTER = {")
    _, _, after = rest.partition("\n}\n")
    (tmp_path / "complete_pipeline.py").write_text(f"{before}CLUSTER = {cluster!r}\n{after}")
    dag = DagBag(tmp_path).dags["complete_pipeline"]
    assert "start_cluster" not in dag.task_ids
    today = datetime.now(UTC)
    run = dag.test(logical_date=today)
    assert run.state == DagRunState.SUCCESS
    assert query_statuses(own) == ["Success"] * 4
    keys = {name: own.environment[name] for name in own.environment if name.startswith("AWS_")}
    uri = f"s3://your-bucket/reports/daily/{run.logical_date.date()}.parquet"
    report = pl.read_parquet(uri, storage_options={k.lower(): v for k, v in keys.items()})
    assert report["revenue"].sum() > 0
    assert variables() == []
    assert runs(own)


@pytest.mark.parametrize(
    "extra",
    [
        {"headers": {"authorization": "Bearer s3cr3t", "host": "forbidden"}},
        {"headers": {"authorization": "Bearer s3cr3t", "port": 5051}},
    ],
    ids=["refused_by_the_client", "of_another_form"],
)
def test_no_traceback_shows_a_header(
    cluster: dict[str, str],
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
    extra: dict[str, Any],
) -> None:
    connection = json.dumps({"conn_type": "http", "extra": extra})
    monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", connection)
    with start_try(), pytest.raises(Exception) as raised, use_cluster(cluster):  # noqa: PT011
        pass
    frames = raised.tb.tb_next  # without this test's own entries
    shown = "".join(
        TracebackException(raised.type, raised.value, frames, capture_locals=True).format()
    )
    assert "use_cluster" in shown
    assert "s3cr3t" not in shown
