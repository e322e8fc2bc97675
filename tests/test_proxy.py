"""Clusters in proxy mode: Polars Cloud forwards the queries, and all promises hold."""

import asyncio
from datetime import timedelta
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowFailException

from polars_cloud_emulator.testing import RunningEmulator
from polars_remote import detach, use_cluster
from polars_remote.cloud.session import EMULATOR
from polars_remote.errors import ClusterRefusedError, QueryCanceledError, QueryRefusedError
from polars_remote.ownership.end import end_orphans
from polars_remote.waiting import deferral, progress
from polars_remote.waiting.in_triggerer import cancel_queries
from polars_remote.waiting.triggers import QueryTrigger
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, kill
from tests.two_rows import FILE, SECONDS, TWO_ROWS, defer, first_event, submit, submit_and_freeze

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4, "connection_mode": "proxy"}
MINUTE = timedelta(minutes=1)

pytestmark = pytest.mark.usefixtures("pc")


def test_a_query_is_on_record_and_labeled_and_no_call_goes_to_the_cluster(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    with start_try(), use_cluster(CLUSTER) as ctx:
        query = submit(ctx)
        [task] = entries(supervisor, "task")
        assert list(task["queries"]) == [FILE]
        emulator.advance_clock(MINUTE)
        result = query.await_result()
    assert (result.location, result.n_rows_total) == ([FILE], 2)
    [recorded] = emulator.state()["queries"]
    assert recorded["labels"][0] == "dag=shop"
    assert not [call for call in emulator.journal() if "compute_plane" in call["path"]]
    assert calls(emulator, "public_info") == 0
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_the_next_try_of_a_killed_worker_resumes_the_query(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    kill(lambda: submit_and_freeze(CLUSTER))
    with start_try(2), use_cluster(CLUSTER) as ctx:
        query = submit(ctx)
        emulator.advance_clock(MINUTE)
        assert query.await_result().location == [FILE]
    assert query_statuses(emulator) == ["Success"]
    assert cluster_statuses(emulator) == ["Stopped"]


def test_a_task_that_fails_cancels_its_query(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try(raises=ZeroDivisionError), use_cluster(CLUSTER) as ctx:
        submit(ctx)
        raise ZeroDivisionError
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_cancellation_that_is_refused_is_tried_again(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    emulator.add_fault("POST query/{id}/cancel", "http_error", status=503, times=2)
    with start_try(raises=ZeroDivisionError), use_cluster(CLUSTER) as ctx:
        submit(ctx)
        raise ZeroDivisionError
    assert query_statuses(emulator) == ["Canceled"]


def test_a_query_that_polars_cloud_has_forgotten_is_submitted_again(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    kill(lambda: submit_and_freeze(CLUSTER))
    emulator.add_fault("GET query/{id}", "http_error", status=404)
    with start_try(2), use_cluster(CLUSTER) as ctx:
        submit(ctx).await_result()
    assert calls(emulator, "SubmitQuery") == 2


def test_the_orphan_of_a_task_that_has_ended_is_canceled_and_its_cluster_stopped(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    kill(lambda: submit_and_freeze(CLUSTER))
    supervisor.states["manual__1"]["run_query"] = "failed"
    assert end_orphans() == []
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("ti")
def test_a_submission_whose_reply_is_lost_is_found_again(emulator: RunningEmulator) -> None:
    emulator.add_fault("SubmitQuery", "answer_lost")
    with use_cluster(CLUSTER) as ctx:
        submit(ctx).await_result()
    assert query_statuses(emulator) == ["Success"]


@pytest.mark.usefixtures("ti")
def test_an_outage_while_waiting_is_survived(emulator: RunningEmulator) -> None:
    with use_cluster(CLUSTER) as ctx:
        query = submit(ctx)
        emulator.add_fault("GET query/{id}", "http_error", status=503, times=2)
        emulator.add_fault("GetQueryResult", "grpc_error", code="UNAVAILABLE", message="down")
        assert query.await_result().location == [FILE]
    assert emulator.state()["faults"] == []


@pytest.mark.usefixtures("ti")
def test_a_query_that_fails_raises_its_own_exception(emulator: RunningEmulator) -> None:
    with (
        pytest.raises(pl.exceptions.ColumnNotFoundError, match="nope"),
        use_cluster(CLUSTER) as ctx,
    ):
        submit(ctx, frame=TWO_ROWS.select("nope")).await_result()


@pytest.mark.usefixtures("ti")
def test_a_query_canceled_from_elsewhere_is_an_error(emulator: RunningEmulator) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with pytest.raises(QueryCanceledError), use_cluster(CLUSTER) as ctx:  # noqa: PT012
        query = submit(ctx)
        emulator.call("POST", f"query/{emulator.state()['queries'][0]['id']}/cancel")
        query.await_result()


def test_a_detached_query_runs_on(emulator: RunningEmulator, start_try: StartTry) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    with start_try(), use_cluster(CLUSTER) as ctx:
        detach(submit(ctx))
    assert query_statuses(emulator) == ["InProgress"]


def test_a_deferred_task_gets_the_result_that_its_trigger_has_seen(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deferral, "LONGEST_RESUME_DELAY", 0.0)
    trigger = defer(emulator, CLUSTER, supervisor, start_try)
    emulator.advance_clock(MINUTE)
    assert first_event(trigger) == {"results": {FILE: {"location": [FILE], "rows": 2}}}


def test_a_trigger_polls_with_the_login_of_its_own_connection(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client_id, secret = emulator.add_service_account("second")
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", f"http://{client_id}:{secret}@")
    first = defer(emulator, CLUSTER, supervisor, start_try)
    second = QueryTrigger(**(first.serialize()[1] | {"conn_id": "second"}))
    query_id = emulator.state()["queries"][0]["id"]

    def polls_of(account: str) -> int:
        return sum(
            call["account"] == account and call["path"].endswith(query_id)
            for call in emulator.journal()
        )

    async def poll_both() -> None:
        runs = [asyncio.ensure_future(anext(aiter(each.run()))) for each in (first, second)]
        while min(polls_of(client_id), polls_of(EMULATOR)) < 3:
            await asyncio.sleep(0.05)
        for each in runs:
            each.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    asyncio.run(asyncio.wait_for(poll_both(), SECONDS))


def test_a_trigger_cancels_the_query_of_a_task_that_is_out_of_time(
    emulator: RunningEmulator, supervisor: Supervisor, start_try: StartTry
) -> None:
    trigger = defer(emulator, CLUSTER, supervisor, start_try)

    asyncio.run(asyncio.wait_for(cancel_queries(trigger.conn_id, trigger.queries), SECONDS))
    assert query_statuses(emulator) == ["Canceled"]


@pytest.mark.usefixtures("ti")
def test_the_log_shows_the_age_of_a_query_and_no_stages(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_AFTER_SECONDS", (0.1, 1800))
    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    with use_cluster(CLUSTER) as ctx:
        query = submit(ctx)
        emulator.add_fault("GET query/{id}", "delay", seconds=0.2, nth=2)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("POLARS_TIMEOUT_MS", "2000")
            with pytest.raises(TimeoutError):
                query.await_result()
        emulator.advance_clock(MINUTE)
        query.await_result()
    assert "INPROGRESS after 0 min" in caplog.text


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize(
    "ask",
    [lambda query: query.plan("ir"), lambda query: query.delete_result()],
    ids=["plan", "delete_result"],
)
def test_what_needs_a_connection_to_the_cluster_is_refused_with_a_clear_error(ask: Any) -> None:
    with use_cluster(CLUSTER) as ctx:
        query = submit(ctx)
        query.await_result()
        with pytest.raises(QueryRefusedError, match="use connection_mode direct"):
            ask(query)


@pytest.mark.usefixtures("ti")
def test_explain_is_refused_before_anything_is_sent(emulator: RunningEmulator) -> None:
    with (
        pytest.raises(QueryRefusedError, match=r"explain .*use connection_mode direct"),
        use_cluster(CLUSTER) as ctx,
    ):
        TWO_ROWS.remote(ctx).explain(plan_stage="ir")
    assert emulator.state()["queries"] == []
    assert cluster_statuses(emulator) == []


def test_a_manifest_changes_its_mode_with_the_code(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    for mode in ("direct", "proxy"):
        with start_try(), use_cluster({**CLUSTER, "connection_mode": mode}) as ctx:
            submit(ctx).await_result()
    planes = [
        call["path"].split(".")[1]
        for call in emulator.journal()
        if call["path"].endswith("/SubmitQuery")
    ]
    assert planes == ["compute_plane", "control_plane"]


@pytest.mark.usefixtures("ti")
def test_a_mode_that_does_not_exist_is_refused_before_a_start(emulator: RunningEmulator) -> None:
    with (
        pytest.raises(ClusterRefusedError, match="Unknown connection_mode 'Proxy'") as refused,
        use_cluster({**CLUSTER, "connection_mode": "Proxy"}),
    ):
        pass
    assert isinstance(refused.value, AirflowFailException)
    assert emulator.state()["manifests"] == []
