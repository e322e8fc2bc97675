"""The admin API, and the responses to unknown calls."""

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import boto3
import grpc
import httpx
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from emulator.tests.blocking_query import BlockingQuery
from emulator.tests.processes import none_running
from emulator.tests.raw_calls import (
    VERSIONS,
    access_token,
    admin_client,
    basic,
    call_grpc,
    rest_client,
)
from polars_cloud_emulator.testing import RunningEmulator

StartCluster = Callable[..., Any]


def test_health_answers_without_a_login(emulator: RunningEmulator) -> None:
    answer = httpx.get(f"{emulator.rest_url}/_emulator/health", trust_env=False)
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    assert emulator.journal() == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *((method, "/api/v1/invoices") for method in ("GET", "POST", "OPTIONS")),
        *((method, "/api/v1/user/me") for method in ("PATCH", "PUT")),
        ("GET", "/api/v1/user/me/"),
    ],
)
def test_unknown_rest_call_is_refused_at_once_and_listed(
    emulator: RunningEmulator, rest: httpx.Client, method: str, path: str
) -> None:
    answer = rest.request(method, path, json={"name": "x"} if method == "POST" else None)
    assert answer.status_code == 501
    message = f"the emulator does not support {method} {path}"
    assert answer.json() == {"message": message, "errors": {}}
    [unmatched] = emulator.state()["unmatched"]
    assert (unmatched["method"], unmatched["path"], unmatched["status"]) == (method, path, 501)


def test_client_shows_why_a_rest_call_is_refused_without_retrying_it(
    emulator: RunningEmulator, pc: ModuleType
) -> None:
    with pytest.raises(ValueError, match="the emulator stores no user settings"):
        pc.Workspace("playground").set_default()
    assert [call["path"] for call in emulator.journal()].count("/api/v1/user") == 1


def test_unknown_grpc_call_leaves_the_channel_intact(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    query = pl.LazyFrame({"x": [1]}).remote(start_cluster()).execute(blocking=False)
    query.await_result()
    method = "/arrow.flight.protocol.FlightService/PollFlightInfo"
    for _ in range(3):
        with pytest.raises(RuntimeError, match=f"does not support POST {method}"):
            query._client.scan_flight(query._query_id)
        assert query.get_status().is_done()
    unmatched = emulator.state()["unmatched"]
    assert [entry["path"] for entry in unmatched] == [method] * 3
    assert {entry["grpc_status"] for entry in unmatched} == {grpc.StatusCode.UNIMPLEMENTED.value[0]}


def test_unknown_grpc_service_is_unimplemented(emulator: RunningEmulator) -> None:
    headers = {"authorization": f"Bearer {access_token(emulator.environment)}", **VERSIONS}
    status, text = call_grpc(emulator.environment, "/polars_cloud.v9.Service/Call", headers)
    assert status is grpc.StatusCode.UNIMPLEMENTED
    assert text == "the emulator does not support POST /polars_cloud.v9.Service/Call"


def test_journal_has_every_call_and_neither_it_nor_the_state_a_secret(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    secrets = {name.lower(): emulator.environment[name] for name in keys}
    context = start_cluster(env_vars={"SHOP_PASSWORD": "worker-secret"})
    remote = pl.LazyFrame({"x": [1]}).remote(context)
    remote.sink_parquet("s3://your-bucket/x/", storage_options=secrets).await_result()
    httpx.get(f"{emulator.rest_url}/api/v1/invoices?token=query-secret", trust_env=False)

    journal = emulator.journal()
    assert [entry["path"].rpartition("/")[2] for entry in journal] == [
        "token",
        "me",
        "workspace",
        "cluster-defaults",
        "start",
        str(context._compute_id),
        "public_info",
        "SubmitQuery",
        "GetQueryResult",
        "invoices",
    ]
    assert {entry["client"].partition(" ")[0] for entry in journal[:-1]} == {"polars-cloud/0.12.0"}
    shown = json.dumps([journal, emulator.state()])
    jwt_header = access_token(emulator.environment).partition(".")[0]
    for secret in (
        emulator.environment["POLARS_CLOUD_CLIENT_SECRET"],
        jwt_header,
        emulator.environment["AWS_SECRET_ACCESS_KEY"],
        "worker-secret",
        "query-secret",
    ):
        assert secret not in shown


def test_journal_keeps_the_beginning_of_long_texts(
    emulator: RunningEmulator, rest: httpx.Client
) -> None:
    rest.get(f"/api/v1/{'x' * 5_000}", headers={"user-agent": "y" * 5_000})
    entry = emulator.journal()[-1]
    assert entry["path"] == f"/api/v1/{'x' * 992}"
    assert entry["client"] == "y" * 1_000


def test_state_shows_what_a_cluster_and_its_queries_cost(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    context = start_cluster(cluster_size=2, labels=["daily"], idle_timeout_mins=30)
    pl.LazyFrame({"x": [1]}).remote(context).execute()
    context.stop()
    [cluster], [query] = emulator.state()["clusters"], emulator.state()["queries"]
    assert (cluster["cluster_size"], cluster["idle_timeout_mins"]) == (2, 30)
    assert cluster["vcpus"] == 2 * context.cpus
    assert cluster["labels"] == ["daily"]
    assert cluster["requested_at"] < query["submitted_at"] < cluster["stopped_at"]
    assert 0 < query["seconds"] < cluster["billed_seconds"]
    assert query["mode"] == "distributed"


def test_reset_brings_back_the_first_state_and_ends_the_workers(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
) -> None:
    first_state = emulator.state()
    sales = "s3://your-bucket/sales/"
    first_sales = pl.read_parquet(sales)
    context = start_cluster(cluster_size=2)
    context.register("airflow-production")
    remote = pl.LazyFrame({"x": [1]}).remote(context)
    remote.sink_parquet("s3://your-bucket/mine/").await_result()
    [overwritten, *_] = pl.scan_parquet(sales, include_file_paths="path").collect()["path"]
    remote.single_node().sink_parquet(overwritten).await_result()
    location = remote.execute().location
    running = blocking.lazy_frame().remote(context).execute(blocking=False)
    blocking.wait_for_start()
    pids = emulator.state()["clusters"][0]["worker_pids"]
    assert pids

    emulator.reset()

    assert emulator.state() == first_state
    assert emulator.journal() == []
    assert none_running(pids)
    assert_frame_equal(pl.read_parquet(sales), first_sales)
    for gone in ("s3://your-bucket/mine/00000000.parquet", *location):
        with pytest.raises(FileNotFoundError):
            pl.read_parquet(gone)
    with pytest.raises(RuntimeError, match="does not exist"):
        running.get_status()
    assert pc.Workspace("playground").name == "playground"


def test_reset_restores_the_sample_data_that_was_changed_and_deletes_what_was_added(
    emulator: RunningEmulator,
) -> None:
    s3: Any = boto3.client("s3")

    def contents() -> dict[str, str]:
        listed = s3.list_objects_v2(Bucket="your-bucket")["Contents"]
        return {entry["Key"]: entry["ETag"] for entry in listed}

    before = contents()
    changed, deleted, *_ = before
    s3.put_object(Bucket="your-bucket", Key=changed, Body=b"something else")
    s3.delete_object(Bucket="your-bucket", Key=deleted)
    s3.put_object(Bucket="your-bucket", Key="results/new", Body=b"new")
    emulator.reset()
    assert contents() == before
    assert s3.get_object(Bucket="your-bucket", Key=changed)["Body"].read() != b"something else"


def test_refused_call_without_the_client_says_why(emulator: RunningEmulator) -> None:
    with pytest.raises(ValueError, match="manifest 'nobodys' does not exist"):
        emulator.call("POST", "manifest/start", {"name": "nobodys"})


CHANGES = [
    ("POST", "faults", {"operation": "GET user/me", "kind": "tokens_expire"}),
    ("DELETE", "faults", None),
    ("POST", "clock", {"advance_seconds": 1}),
    ("POST", "service-accounts", {"name": "second"}),
    ("POST", "reset", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_every_change_needs_the_secret_of_a_service_account(
    emulator: RunningEmulator, method: str, path: str, body: object
) -> None:
    account = emulator.environment
    wrong = {
        "": "send the client id and secret of a service account",
        f"Bearer {access_token(account)}": "send the client id and secret of a service account",
        "Basic": "unknown client id or wrong client secret",
        "Basic \xe9": "the client id and secret are not in Base64",
        basic(account | {"POLARS_CLOUD_CLIENT_SECRET": ""}): "wrong client secret",
        basic(account | {"POLARS_CLOUD_CLIENT_SECRET": "guessed"}): "wrong client secret",
        basic(account | {"POLARS_CLOUD_CLIENT_ID": "somebody-else"}): "unknown client id",
    }
    with admin_client(account) as admin:
        for authorization, expected in wrong.items():
            header = {"authorization": authorization.encode("latin-1")}
            answer = admin.request(method, path, json=body, headers=header)
            assert answer.status_code == 401
            assert expected in answer.json()["message"]
        assert admin.request(method, path, json=body).status_code == 200


def test_added_account_may_change_the_emulator_while_logins_are_refused(
    emulator: RunningEmulator,
) -> None:
    client_id, secret = emulator.add_service_account("second")
    emulator.add_fault("GET user/me", "credentials_revoked")
    with rest_client(emulator.environment) as rest:
        assert rest.get("/api/v1/user/me").status_code == 401
    second = {"POLARS_CLOUD_CLIENT_ID": client_id, "POLARS_CLOUD_CLIENT_SECRET": secret}
    with admin_client(emulator.environment | second) as admin:
        assert admin.delete("faults").status_code == 200
    assert access_token(emulator.environment)


@pytest.mark.parametrize("path", ["/", "/_emulator/state", "/_emulator/journal"])
def test_reading_needs_no_login(emulator: RunningEmulator, path: str) -> None:
    assert httpx.get(f"{emulator.rest_url}{path}", trust_env=False).status_code == 200
