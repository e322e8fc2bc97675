"""Service account, access tokens, and the check of the client's version."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import Any

import grpc
import httpx
import jwt
import polars as pl
import pytest

from emulator.tests.raw_calls import (
    COMPUTE_PLANE,
    CONTROL_PLANE,
    TOKEN_PATH,
    VERSIONS,
    access_token,
    call_grpc,
    rest_client,
)
from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.testing import RunningEmulator, running_emulator

ME = "/api/v1/user/me"

StartEmulator = Callable[..., RunningEmulator]
RunClient = Callable[..., str]


def token_calls(emulator: RunningEmulator) -> int:
    return sum(entry["path"] == TOKEN_PATH for entry in emulator.journal())


def test_right_secret_logs_in_with_one_token(emulator: RunningEmulator, pc: ModuleType) -> None:
    assert pc.Workspace("playground").name == "playground"
    assert [entry["path"] for entry in emulator.journal()] == [TOKEN_PATH, ME, "/api/v1/workspace"]


@pytest.mark.parametrize(
    ("client_id", "client_secret"),
    [("polars-cloud-emulator", "wrong-secret"), ("somebody-else", None)],
)
def test_wrong_credentials_are_refused_and_not_stored(
    emulator: RunningEmulator, pc: ModuleType, client_id: str, client_secret: str | None
) -> None:
    from polars_cloud.polars_cloud import AuthLoadError

    secret = client_secret or emulator.environment["POLARS_CLOUD_CLIENT_SECRET"]
    with pytest.raises(AuthLoadError, match="missing field `access_token`"):
        pc.authenticate(client_id=client_id, client_secret=secret, interactive=False)
    assert emulator.journal()[-1]["status"] == 401
    assert secret not in json.dumps([emulator.journal(), emulator.state()])


def test_expiring_token_is_renewed_automatically(
    emulator_here: StartEmulator, run_client: RunClient
) -> None:
    # The client renews a token that expires in less than 10 s before each call.
    emulator = emulator_here(token_lifetime=timedelta(seconds=8))
    result = "pl.LazyFrame({'x': [1]}).remote(ctx).execute().n_rows_total"
    code = f"""
ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
ctx.start()
print({result})
"""
    assert run_client(emulator.environment, code) == "1"
    other_calls = len(emulator.journal()) - token_calls(emulator)
    assert token_calls(emulator) >= other_calls > 5


def test_long_lived_token_is_fetched_once(
    emulator_here: StartEmulator, run_client: RunClient
) -> None:
    emulator = emulator_here(token_lifetime=timedelta(minutes=5))
    run_client(emulator.environment, "pc.Workspace.list()\npc.Workspace.list()")
    assert token_calls(emulator) == 1


def test_token_is_good_until_it_expires(emulator_here: StartEmulator) -> None:
    clock = Clock()
    emulator = emulator_here(clock=clock, token_lifetime=timedelta(minutes=5))
    with rest_client(emulator.environment) as rest:
        clock.advance(timedelta(minutes=4, seconds=50))
        assert rest.get(ME).status_code == 200
        clock.advance(timedelta(seconds=10))
        answer = rest.get(ME)
    assert answer.status_code == 401
    assert answer.json() == {"message": "the access token has expired", "errors": {}}


def test_token_from_an_emulator_that_is_ahead_has_the_emulators_time(
    emulator_here: StartEmulator,
) -> None:
    clock = Clock()
    clock.advance(timedelta(days=1))
    emulator = emulator_here(clock=clock, token_lifetime=timedelta(minutes=5))
    with rest_client(emulator.environment) as rest:
        assert rest.get(ME).status_code == 200
        token = rest.headers["authorization"].removeprefix("Bearer ")
    expiry = jwt.decode(token, options={"verify_signature": False})["exp"]
    assert 0 < expiry - time.time() <= 300


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (None, "no access token"),
        ("Basic cG9sYXJzOg==", "no access token"),
        (
            "Bearer "
            + jwt.encode({"exp": 2**33}, "another secret, just as long as it needs to be"),
            "this access token was not issued by this emulator",
        ),
        (
            "Bearer " + jwt.encode({"sub": "polars-cloud-emulator"}, None, algorithm="none"),
            "this access token was not issued by this emulator",
        ),
    ],
)
def test_call_without_a_token_from_here_is_refused(
    emulator: RunningEmulator, authorization: str | None, expected: str
) -> None:
    headers = VERSIONS if authorization is None else {**VERSIONS, "authorization": authorization}
    answer = httpx.get(f"{emulator.rest_url}{ME}", headers=headers, trust_env=False)
    assert (answer.status_code, answer.json()["message"]) == (401, expected)
    for method in (f"{COMPUTE_PLANE}/GetQueryStatus", f"{CONTROL_PLANE}/GetQueryResult"):
        refusal = call_grpc(emulator.environment, method, headers)
        assert refusal == (grpc.StatusCode.UNAUTHENTICATED, expected)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"x-client-version": "0.11.3", "user-agent": "polars-cloud/0.11.3"},
            "this emulator supports polars_cloud 0.12.x, not polars-cloud/0.11.3",
        ),
        ({"x-client-version": "0.120.0"}, "this emulator supports polars_cloud 0.12.x, not "),
        ({"x-client-version": None}, "install polars-cloud==0.12.*"),
        (
            {"x-polars-version": "1.44.2"},
            f"this emulator runs polars {pl.__version__}, the client has 1.44.2",
        ),
        ({"x-polars-version": None}, f"install polars=={pl.__version__}"),
    ],
)
def test_unsupported_client_is_refused_by_name_and_version(
    emulator: RunningEmulator, changed: dict[str, str | None], expected: str
) -> None:
    authorization = {"authorization": f"Bearer {access_token(emulator.environment)}"}
    wanted: dict[str, Any] = {**authorization, **VERSIONS, **changed}
    headers = {name: value for name, value in wanted.items() if value is not None}

    answer = httpx.get(f"{emulator.rest_url}{ME}", headers=headers, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["errors"] == {}
    assert expected in answer.json()["message"]

    for method in (f"{COMPUTE_PLANE}/SubmitQuery", f"{CONTROL_PLANE}/SubmitQuery"):
        headers.pop("user-agent", None)
        status, text = call_grpc(emulator.environment, method, headers)
        assert status is grpc.StatusCode.FAILED_PRECONDITION
        assert expected.partition(", not ")[0] in text


def test_another_client_version_is_accepted_if_the_variable_allows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EMULATOR_ANY_CLIENT", "1")
    with running_emulator() as emulator, rest_client(emulator.environment) as client:
        newer = {"x-client-version": "0.13.0"}
        assert client.get(ME, headers=newer).status_code == 200
        another_polars = {**newer, "x-polars-version": "1.44.2"}
        assert client.get(ME, headers=another_polars).status_code == 400
