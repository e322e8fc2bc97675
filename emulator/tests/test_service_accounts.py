"""Several service accounts: separate logins, and the account of each call in the journal."""

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import grpc
import httpx
import polars as pl
import pytest

from emulator.tests.raw_calls import (
    COMPUTE_PLANE,
    CONTROL_PLANE,
    VERSIONS,
    access_token,
    admin_client,
    call_grpc,
    rest_client,
)
from polars_cloud_emulator.testing import RunningEmulator

FIRST = "polars-cloud-emulator"
SECOND = "polars-cloud-emulator-second"
ME = "/api/v1/user/me"


def environment_of_second(emulator: RunningEmulator) -> dict[str, str]:
    """Add an account, and return the environment of a client that uses it."""
    client_id, secret = emulator.add_service_account("second")
    account = {"POLARS_CLOUD_CLIENT_ID": client_id, "POLARS_CLOUD_CLIENT_SECRET": secret}
    return emulator.environment | account


def accounts(emulator: RunningEmulator, path: str) -> list[str | None]:
    """Return the accounts of the calls with this path, oldest first."""
    return [entry["account"] for entry in emulator.journal() if entry["path"] == path]


def test_rest_calls_of_two_accounts_are_distinguished(emulator: RunningEmulator) -> None:
    with (
        rest_client(emulator.environment) as first,
        rest_client(environment_of_second(emulator)) as second,
    ):
        statuses = [rest.get(ME).status_code for rest in (first, second, second, first)]
    assert statuses == [200] * 4
    assert accounts(emulator, ME) == [FIRST, SECOND, SECOND, FIRST]


@pytest.mark.parametrize("plane", [COMPUTE_PLANE, CONTROL_PLANE])
def test_grpc_calls_of_two_accounts_are_distinguished(
    emulator: RunningEmulator, plane: str
) -> None:
    first, second = (
        {"authorization": f"Bearer {access_token(environment)}", **VERSIONS}
        for environment in (emulator.environment, environment_of_second(emulator))
    )
    for headers in (first, second, second, first):
        status, _ = call_grpc(emulator.environment, f"{plane}/GetQueryResult", headers)
        assert status is not grpc.StatusCode.UNAUTHENTICATED
    assert accounts(emulator, f"{plane}/GetQueryResult") == [FIRST, SECOND, SECOND, FIRST]


def test_the_client_runs_a_query_as_another_account(
    pc: ModuleType, emulator: RunningEmulator, start_cluster: Callable[..., Any]
) -> None:
    client_id, secret = emulator.add_service_account("second")
    pc.authenticate(client_id=client_id, client_secret=secret, interactive=False)
    assert pl.LazyFrame({"x": [1]}).remote(start_cluster()).execute().n_rows_total == 1
    by_second = [entry["path"] for entry in emulator.journal() if entry["account"] == SECOND]
    assert by_second[0] == ME
    assert by_second[-2:] == [f"{COMPUTE_PLANE}/SubmitQuery", f"{COMPUTE_PLANE}/GetQueryResult"]


def test_call_without_a_valid_token_has_no_account(emulator: RunningEmulator) -> None:
    environment = environment_of_second(emulator)
    with rest_client(environment) as second:
        second.get(ME)
        emulator.add_fault("GET user/me", "tokens_expire")
        assert [second.get(ME).status_code for _ in range(2)] == [401, 401]
    httpx.get(f"{emulator.rest_url}{ME}", headers=VERSIONS, trust_env=False)
    # The token was still valid when the call came in that made it expire.
    assert accounts(emulator, ME) == [SECOND, SECOND, None, None]
    assert accounts(emulator, "/realms/Polars/protocol/openid-connect/token") == [None]


def test_no_secret_of_an_added_account_is_shown(emulator: RunningEmulator) -> None:
    environment = environment_of_second(emulator)
    with rest_client(environment) as second:
        second.get(ME)
        token = second.headers["authorization"].removeprefix("Bearer ")
    shown = json.dumps([emulator.journal(), emulator.state()])
    assert SECOND in shown
    for secret in (environment["POLARS_CLOUD_CLIENT_SECRET"], *token.split(".")):
        assert secret not in shown


def test_an_account_logs_in_with_no_secret_but_its_own(emulator: RunningEmulator) -> None:
    first, second = emulator.environment, environment_of_second(emulator)
    secrets = [each["POLARS_CLOUD_CLIENT_SECRET"] for each in (first, second)]
    for environment, secret in zip((first, second), reversed(secrets), strict=True):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            access_token(environment | {"POLARS_CLOUD_CLIENT_SECRET": secret})


def test_an_account_that_exists_is_refused(emulator: RunningEmulator) -> None:
    environment = environment_of_second(emulator)
    with pytest.raises(ValueError, match=f"service account '{SECOND}' exists"):
        emulator.add_service_account("second")
    assert access_token(environment)


@pytest.mark.parametrize(
    "body", [{}, *({"name": name} for name in ("", "Second", "a b", "second\n", 2))]
)
def test_name_with_other_characters_is_refused(
    emulator: RunningEmulator, body: dict[str, object]
) -> None:
    with admin_client(emulator.environment) as admin:
        answer = admin.post("service-accounts", json=body)
    assert answer.status_code == 400
    assert "cannot decode the body of /_emulator/service-accounts" in answer.json()["message"]


def test_reset_removes_added_accounts_and_their_tokens(emulator: RunningEmulator) -> None:
    environment = environment_of_second(emulator)
    with rest_client(emulator.environment) as first, rest_client(environment) as second:
        emulator.reset()
        assert first.get(ME).status_code == 200
        refused = second.get(ME)
    assert (refused.status_code, refused.json()["message"]) == (
        401,
        f"service account '{SECOND}' was removed",
    )
    assert accounts(emulator, ME) == [FIRST, None]
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        access_token(environment)
    assert emulator.add_service_account("second")[0] == SECOND
    with rest_client(emulator.environment) as rest:
        rest.headers["authorization"] = second.headers["authorization"]
        assert rest.get(ME).status_code == 401
