"""Faults, as the real client sees them."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import grpc
import httpx
import polars as pl
import psutil
import pytest

from emulator.tests.processes import none_running
from emulator.tests.raw_calls import (
    CLUSTER,
    COMPUTE_PLANE,
    VERSIONS,
    WORKSPACE,
    access_token,
    admin_client,
    call_grpc,
    rest_client,
)
from polars_cloud_emulator.testing import RunningEmulator, eventually, running_emulator

ME = "/api/v1/user/me"

StartCluster = Callable[..., Any]


@pytest.fixture
def remote(start_cluster: StartCluster) -> Any:
    """Return a remote query on a cluster with one worker."""
    return pl.LazyFrame({"x": [1, 2]}).remote(start_cluster())


def calls(emulator: RunningEmulator, name: str) -> list[int | None]:
    """Return the gRPC or HTTP statuses of the journal's calls whose path ends with ``name``."""
    return [
        entry["status"] if entry["grpc_status"] is None else entry["grpc_status"]
        for entry in emulator.journal()
        if entry["path"].endswith(f"/{name}")
    ]


# Calls


@pytest.mark.parametrize("status", [400, 403, 409, 500, 502, 503])
def test_http_error_is_shown_by_the_client_and_the_call_has_no_effect(
    emulator: RunningEmulator, start_cluster: StartCluster, status: int
) -> None:
    emulator.add_fault("POST compute/start", "http_error", status=status, message="out of order")
    with pytest.raises(ValueError, match="out of order"):
        start_cluster()
    assert calls(emulator, "start") == [status]
    assert emulator.state()["clusters"] == []


def test_http_error_without_a_message_is_that_of_a_gateway(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    emulator.add_fault("POST compute/start", "http_error", status=503)
    with pytest.raises(ValueError, match="Status 503 Service Unavailable with body: <html>"):
        start_cluster()


def test_http_429_is_retried_by_the_client(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    emulator.add_fault("POST compute/start", "http_error", status=429, message="too many")
    start_cluster()
    assert calls(emulator, "start") == [429, 200]
    assert len(emulator.state()["clusters"]) == 1


def test_grpc_error_is_shown_by_the_client_and_the_call_has_no_effect(
    emulator: RunningEmulator, remote: Any
) -> None:
    emulator.add_fault("SubmitQuery", "grpc_error", code="RESOURCE_EXHAUSTED", message="too many")
    with pytest.raises(RuntimeError, match="too many"):
        remote.execute()
    assert calls(emulator, "SubmitQuery") == [grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]]
    assert emulator.state()["queries"] == []


def test_waiting_client_retries_when_the_scheduler_is_unavailable(
    emulator: RunningEmulator, remote: Any
) -> None:
    emulator.add_fault("GetQueryResult", "grpc_error", code="UNAVAILABLE", message="ask again")
    assert remote.execute().n_rows_total == 2
    unavailable, ok = grpc.StatusCode.UNAVAILABLE.value[0], grpc.StatusCode.OK.value[0]
    assert calls(emulator, "GetQueryResult") == [unavailable, ok]


def test_reset_call_has_no_effect_and_is_in_the_journal_without_a_response(
    emulator: RunningEmulator, rest: httpx.Client, remote: Any
) -> None:
    emulator.add_fault("SubmitQuery", "connection_reset")
    with pytest.raises(RuntimeError, match="transport error"):
        remote.execute()
    assert calls(emulator, "SubmitQuery") == [None]
    assert emulator.state()["queries"] == []
    assert remote.execute().n_rows_total == 2

    emulator.add_fault("GET user/me", "connection_reset")
    with pytest.raises(httpx.ReadError, match="reset by peer"):
        rest.get(ME)
    assert rest.get(ME).status_code == 200


def test_call_whose_response_is_lost_takes_effect(
    emulator: RunningEmulator, start_cluster: StartCluster, pc: ModuleType
) -> None:
    emulator.add_fault("POST compute/start", "answer_lost")
    with pytest.raises(RuntimeError, match="error sending request"):
        start_cluster()
    [cluster] = emulator.state()["clusters"]
    assert (cluster["status"], calls(emulator, "start")) == ("Idle", [None])

    context = pc.ComputeContext.connect(cluster["id"], workspace="playground")
    emulator.add_fault("SubmitQuery", "answer_lost")
    with pytest.raises(RuntimeError, match="transport error"):
        pl.LazyFrame({"x": [1]}).remote(context).execute()
    eventually(lambda: [q["status"] for q in emulator.state()["queries"]] == ["Success"])
    assert calls(emulator, "SubmitQuery") == [None]


def test_delayed_call_takes_effect_after_the_delay(emulator: RunningEmulator, remote: Any) -> None:
    emulator.add_fault("SubmitQuery", "delay", seconds=0.5)
    began = time.monotonic()
    remote.execute(blocking=False)
    assert time.monotonic() - began >= 0.5
    assert len(emulator.state()["queries"]) == 1


def test_delayed_call_takes_effect_when_the_faults_are_cleared(
    emulator: RunningEmulator, remote: Any, background: Executor
) -> None:
    emulator.add_fault("SubmitQuery", "delay", seconds=3600)
    executing = background.submit(remote.execute)
    eventually(lambda: calls(emulator, "SubmitQuery") == [None])
    assert emulator.state()["queries"] == []
    emulator.clear_faults()
    assert executing.result().n_rows_total == 2


def test_stalled_call_is_reset_when_the_faults_are_cleared(
    emulator: RunningEmulator, remote: Any, background: Executor
) -> None:
    emulator.add_fault("SubmitQuery", "stall")
    executing = background.submit(remote.execute)
    eventually(lambda: calls(emulator, "SubmitQuery") == [None])
    emulator.clear_faults()
    with pytest.raises(RuntimeError, match="transport error"):
        executing.result()
    assert emulator.state()["queries"] == []


def test_stalled_call_ends_when_the_client_gives_up(emulator: RunningEmulator) -> None:
    emulator.add_fault("GET user/me", "stall")
    url = httpx.URL(emulator.rest_url)
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(f"GET {ME} HTTP/1.1\r\nHost: {url.host}\r\n\r\n".encode())
        eventually(lambda: calls(emulator, "me") == [None])
        own_port = client.getsockname()[1]
        assert own_port in ports_served(emulator)
    eventually(lambda: own_port not in ports_served(emulator))


def ports_served(emulator: RunningEmulator) -> set[int]:
    connections = psutil.Process(emulator.pid).net_connections("tcp")
    return {connection.raddr.port for connection in connections if connection.raddr}


def test_stalled_calls_do_not_delay_the_end_of_the_emulator(background: Executor) -> None:
    with running_emulator() as emulator, rest_client(emulator.environment) as rest:
        headers = {"authorization": f"Bearer {access_token(emulator.environment)}", **VERSIONS}
        for operation in ("GET user/me", "GetQueryStatus"):
            emulator.add_fault(operation, "stall")
        by_rest = background.submit(rest.get, ME, timeout=60)
        method = f"{COMPUTE_PLANE}/GetQueryStatus"
        by_grpc = background.submit(call_grpc, emulator.environment, method, headers)
        eventually(lambda: calls(emulator, "me") == calls(emulator, "GetQueryStatus") == [None])
        began = time.monotonic()
    assert time.monotonic() - began < 15
    assert isinstance(by_rest.exception(), httpx.ReadError)
    assert by_grpc.result()[0] is grpc.StatusCode.UNAVAILABLE


# Queries


@pytest.mark.parametrize(
    ("error", "exception"),
    [
        ("ColumnNotFoundError: no column 'y'", pl.exceptions.ColumnNotFoundError),
        ("SchemaError: no column 'y'", pl.exceptions.SchemaError),
        ("PermissionError: no column 'y'", PermissionError),
    ],
)
def test_query_fails_with_the_given_error(
    emulator: RunningEmulator, remote: Any, error: str, exception: type[Exception]
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error=error)
    with pytest.raises(exception, match="no column 'y'"):
        remote.execute()
    [query] = emulator.state()["queries"]
    assert (query["status"], query["error"]) == ("Failed", error)
    assert remote.execute().n_rows_total == 2


def test_hanging_query_occupies_its_worker_until_it_is_cancelled(
    emulator: RunningEmulator, pc: ModuleType, start_cluster: StartCluster
) -> None:
    remote = pl.LazyFrame({"x": [1, 2]}).remote(start_cluster(cluster_size=2))
    emulator.add_fault("SubmitQuery", "query_hangs")
    hanging = remote.single_node().execute(blocking=False)
    for _ in range(3):
        assert remote.single_node().execute().n_rows_total == 2
    waiting_for_both_workers = remote.distributed(min_workers=2).execute(blocking=False)
    emulator.advance_clock(timedelta(days=1))
    log_in(pc, emulator)
    statuses = [query["status"] for query in emulator.state()["queries"]]
    assert statuses == ["InProgress", "Success", "Success", "Success", "Scheduled"]
    hanging.cancel()
    assert hanging.await_result().status.name == "CANCELED"
    assert waiting_for_both_workers.await_result().n_rows_total == 2
    assert [query["cancels"] for query in emulator.state()["queries"]] == [1, 0, 0, 0, 0]


def test_long_query_ends_when_its_time_has_passed_on_the_clock(
    emulator: RunningEmulator, remote: Any
) -> None:
    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    query = remote.execute(blocking=False)
    eventually(lambda: emulator.state()["queries"][0]["status"] == "InProgress")
    assert remote.context.get_status().name == "RUNNING"
    emulator.advance_clock(timedelta(seconds=60))
    assert query.await_result().n_rows_total == 2


def test_waiting_query_lets_others_run_and_ends_when_its_time_has_passed_on_the_clock(
    emulator: RunningEmulator, remote: Any
) -> None:
    emulator.add_fault("SubmitQuery", "query_waits", seconds=60)
    waiting = remote.execute(blocking=False)
    assert remote.execute().n_rows_total == 2
    assert emulator.state()["queries"][0]["status"] == "Scheduled"
    emulator.advance_clock(timedelta(seconds=60))
    assert waiting.await_result().n_rows_total == 2


def test_query_that_takes_long_frees_its_worker_when_it_is_cancelled(
    emulator: RunningEmulator, remote: Any
) -> None:
    for _ in range(10):
        emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
        query = remote.execute(blocking=False)
        eventually(lambda: emulator.state()["queries"][-1]["status"] == "InProgress")
        query.cancel()
        assert remote.execute().n_rows_total == 2


def test_hanging_query_ends_with_its_cluster(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    emulator.add_fault("SubmitQuery", "query_hangs")
    hanging = pl.LazyFrame({"x": [1]}).remote(context).execute(blocking=False)
    eventually(lambda: emulator.state()["queries"][0]["status"] == "InProgress")
    context.stop()
    with pytest.raises(RuntimeError, match="cluster was stopped"):
        hanging.await_result()
    assert emulator.state()["clusters"][0]["status"] == "Stopped"


def test_worker_that_is_killed_fails_its_query_and_is_replaced(
    emulator: RunningEmulator, remote: Any
) -> None:
    assert remote.execute().n_rows_total == 2
    [before] = emulator.state()["clusters"][0]["worker_pids"]
    emulator.add_fault("SubmitQuery", "worker_killed")
    with pytest.raises(RuntimeError, match="worker process died with SIGKILL"):
        remote.execute()
    assert none_running([before])
    assert remote.execute().n_rows_total == 2


def test_lost_cluster_fails_with_its_queries(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    context = start_cluster(cluster_size=2)
    remote = pl.LazyFrame({"x": [1]}).remote(context)
    remote.execute()
    pids = emulator.state()["clusters"][0]["worker_pids"]
    emulator.add_fault("SubmitQuery", "cluster_lost", message="the machine was reclaimed")
    with pytest.raises(RuntimeError, match="cluster failed: the machine was reclaimed"):
        remote.execute()
    eventually(lambda: emulator.state()["clusters"][0]["status"] == "Failed")
    assert none_running(pids)
    assert context.get_status().name == "FAILED"


def test_query_fault_applies_in_proxy_mode(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: of a fault")
    remote = pl.LazyFrame({"x": [1]}).remote(start_cluster(connection_mode="proxy"))
    with pytest.raises(pl.exceptions.SchemaError, match="of a fault"):
        remote.execute()


# Start-ups


def test_cluster_whose_start_up_fails_says_why(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    emulator.add_fault("POST compute/start", "startup_fails", message="no capacity")
    with pytest.raises(RuntimeError, match=r"terminal state \(no capacity\)"):
        start_cluster()
    [cluster] = emulator.state()["clusters"]
    assert (cluster["status"], cluster["worker_pids"]) == ("Failed", [])


def test_manifest_can_be_started_again_after_a_start_up_that_failed(
    emulator: RunningEmulator, pc: ModuleType
) -> None:
    specs = {"workspace": "playground", "cpus": 2, "memory": 4}
    pc.ComputeContext(**specs).register("nightly")
    emulator.add_fault("POST manifest/start", "startup_fails", message="no capacity")
    with pytest.raises(RuntimeError, match="no capacity"):
        pc.ComputeContext(name="nightly", workspace="playground").start()
    again = pc.ComputeContext(name="nightly", workspace="playground")
    again.start()
    assert again.get_status().is_available()
    assert [c["status"] for c in emulator.state()["clusters"]] == ["Failed", "Idle"]


@pytest.mark.parametrize("start", ["compute/start", "manifest/start"])
def test_slow_start_up_is_measured_by_the_emulators_clock(
    emulator: RunningEmulator, rest: httpx.Client, start: str
) -> None:
    rest.post(f"{WORKSPACE}/manifest", json={**CLUSTER, "name": "nightly"})
    emulator.add_fault(f"POST {start}", "startup_takes", seconds=200)
    started = rest.post(f"{WORKSPACE}/{start}", json={**CLUSTER, "name": "nightly"}).json()
    assert started["status"] == "Starting"
    emulator.advance_clock(timedelta(seconds=190))
    assert rest.get(f"{WORKSPACE}/compute/{started['id']}").json()["status"] == "Starting"
    emulator.advance_clock(timedelta(seconds=10))
    eventually(lambda: emulator.state()["clusters"][0]["status"] == "Idle")


# Logins


def test_tokens_expire_with_the_call_and_a_new_login_works(
    emulator: RunningEmulator, pc: ModuleType, remote: Any
) -> None:
    query = remote.execute(blocking=False)
    query.await_result()
    emulator.add_fault("GetQueryStatus", "tokens_expire", nth=2)
    assert query.get_status().is_done()
    with pytest.raises(RuntimeError, match="the access token has expired"):
        query.get_status()
    with pytest.raises(ValueError, match="Status 401 Unauthorized"):
        pc.Workspace("playground").name  # noqa: B018 (asks for it)
    log_in(pc, emulator)
    assert query.get_status().is_done()
    assert pc.Workspace("playground").name == "playground"


@pytest.mark.parametrize("end", ["clear_faults", "reset"])
def test_revoked_credentials_are_refused_until_the_faults_are_cleared(
    emulator: RunningEmulator, pc: ModuleType, end: str
) -> None:
    from polars_cloud.polars_cloud import AuthLoadError

    emulator.add_fault("GET workspace", "credentials_revoked")
    with pytest.raises(ValueError, match="Status 401 Unauthorized"):
        pc.Workspace("playground").name  # noqa: B018
    with pytest.raises(AuthLoadError):
        log_in(pc, emulator)
    assert [fault["kind"] for fault in emulator.state()["faults"]] == ["credentials_revoked"]
    getattr(emulator, end)()
    log_in(pc, emulator)
    assert pc.Workspace("playground").name == "playground"


def log_in(pc: ModuleType, emulator: RunningEmulator) -> None:
    pc.authenticate(
        client_id=emulator.environment["POLARS_CLOUD_CLIENT_ID"],
        client_secret=emulator.environment["POLARS_CLOUD_CLIENT_SECRET"],
        interactive=False,
    )


# All faults


def test_fault_applies_from_the_nth_call_on_as_often_as_given(
    emulator: RunningEmulator, rest: httpx.Client
) -> None:
    fault = {"operation": "GET user/me", "status": 503, "message": "no"}
    emulator.add_fault(kind="http_error", nth=2, times=2, **fault)
    assert rest.get(ME).status_code == 200
    assert rest.get(f"{WORKSPACE}/compute").status_code == 200
    assert emulator.state()["faults"] == [{"kind": "http_error", "nth": 1, "times": 2, **fault}]
    assert [rest.get(ME).status_code for _ in range(2)] == [503, 503]
    assert emulator.state()["faults"] == []
    assert rest.get(ME).status_code == 200


def test_one_fault_applies_to_a_call_and_the_first_posted_comes_first(
    emulator: RunningEmulator, rest: httpx.Client
) -> None:
    for status, nth in ((500, 1), (502, 1), (503, 3), (504, 2)):
        fault = {"status": status, "nth": nth, "message": ""}
        emulator.add_fault("GET user/me", "http_error", **fault)
    assert [rest.get(ME).status_code for _ in range(5)] == [500, 502, 503, 504, 200]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("nothing", "the kinds are http_error (status, message), grpc_error (code, message), "),
        ({"operation": "GetQueryStatus"}, "missing required field `kind`"),
        ({"operation": "GetQueryStatus", "kind": "flood"}, "Invalid value 'flood' - at `$.kind`"),
        ({"kind": "stall"}, "missing required field `operation`"),
        ({"operation": "SubmitQuery", "kind": "query_fails"}, "missing required field `error`"),
        (
            {"operation": "SubmitQuery", "kind": "query_fails", "error": "ColumnNotFoundError"},
            "at `$.error`",
        ),
        ({"operation": "SubmitQuery", "kind": "stall", "nth": 0}, "`int` >= 1 - at `$.nth`"),
        ({"operation": "SubmitQuery", "kind": "stall", "after": 1}, "unknown field `after`"),
        (
            {"operation": "SubmitQuery", "kind": "grpc_error", "code": "GONE", "message": ""},
            "unknown code 'GONE'; the codes are CANCELLED, ",
        ),
        (
            {"operation": "POST invoice", "kind": "startup_fails", "message": ""},
            "startup_fails (message) is for the unknown operation 'POST invoice'; "
            "its operations are POST compute/start, POST manifest/start",
        ),
        (
            {"operation": "GetQueryStatus", "kind": "query_hangs"},
            "query_hangs (no fields) is incompatible with operation 'GetQueryStatus'; "
            "its operations are SubmitQuery",
        ),
        (
            {"operation": "GET query", "kind": "grpc_error", "code": "INTERNAL", "message": ""},
            "its operations are CancelQuery, DeleteQueryResult, GetComputeVersions, GetQueryPlans, "
            "GetQueryResult, GetQueryStatus, SubmitQuery",
        ),
        (
            {"operation": "SubmitQuery", "kind": "http_error", "status": 500, "message": ""},
            "DELETE manifest, GET aws, GET cluster-defaults, GET compute, GET compute/{id}, "
            "GET compute/{id}/public_info, GET manifest/find, GET organization, "
            "GET organization/{id}, GET query, GET query/{id}, GET user/me, GET workspace, "
            "GET workspace/{id}, POST compute/start, POST compute/{id}/stop, POST device, "
            "POST manifest, POST manifest/start, POST query/{id}/cancel, POST token",
        ),
    ],
)
def test_unknown_fault_is_refused_with_a_list_of_the_known_ones(
    emulator: RunningEmulator, fault: object, expected: str
) -> None:
    with admin_client(emulator.environment) as admin:
        answer = admin.post("faults", json=fault)
    assert answer.status_code == 400
    assert expected in answer.json()["message"]
    assert emulator.state()["faults"] == []


@pytest.mark.parametrize("end", ["clear_faults", "reset"])
def test_cleared_fault_does_not_apply(emulator: RunningEmulator, end: str) -> None:
    emulator.add_fault("GET user/me", "http_error", status=503, message="no")
    getattr(emulator, end)()
    assert emulator.state()["faults"] == []
    with rest_client(emulator.environment) as rest:
        assert rest.get(ME).status_code == 200


def test_advanced_clock_lets_an_idle_cluster_stop(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    start_cluster(idle_timeout_mins=20)
    emulator.advance_clock(timedelta(minutes=19))
    [cluster] = emulator.state()["clusters"]
    assert cluster["status"] == "Idle"
    assert cluster["billed_seconds"] >= 19 * 60
    emulator.advance_clock(timedelta(minutes=1))
    eventually(lambda: emulator.state()["clusters"][0]["status"] == "Stopped")


def test_reset_resets_the_clock(emulator: RunningEmulator) -> None:
    assert emulator.advance_clock(timedelta(days=1)) - datetime.now(UTC) > timedelta(hours=23)
    emulator.reset()
    assert emulator.advance_clock(timedelta(0)) - datetime.now(UTC) < timedelta(hours=1)


@pytest.mark.parametrize("body", [{}, {"advance_seconds": -1}, {"advance_minutes": 1}])
def test_clock_moves_forward_only(emulator: RunningEmulator, body: dict[str, float]) -> None:
    with admin_client(emulator.environment) as admin:
        answer = admin.post("clock", json=body)
    assert answer.status_code == 400
    assert "advance_" in answer.json()["message"]
