"""Device logins: a person confirms a code from the terminal on a page."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from emulator.tests.raw_calls import VERSIONS, tls_client
from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.testing import RunningEmulator

LOGINS = "/realms/Polars/protocol/openid-connect"
ACCOUNT = ("POLARS_CLOUD_CLIENT_ID", "POLARS_CLOUD_CLIENT_SECRET")

StartEmulator = Callable[..., RunningEmulator]
Answer = tuple[int, dict[str, str]]


def ask(emulator: RunningEmulator, path: str, **form: str) -> Answer:
    with tls_client(emulator.environment) as client:
        answer = client.post(f"{LOGINS}/{path}", data={"client_id": "PolarsCloud", **form})
    return answer.status_code, answer.json()


def collect(emulator: RunningEmulator, login: dict[str, str]) -> Answer:
    grant = "urn:ietf:params:oauth:grant-type:device_code"
    return ask(emulator, "token", grant_type=grant, device_code=login["device_code"])


def renew(emulator: RunningEmulator, refresh_token: str) -> Answer:
    return ask(emulator, "token", grant_type="refresh_token", refresh_token=refresh_token)


def confirm(environment: Mapping[str, str], page: str) -> httpx.Response:
    form = {
        "client_id": environment["POLARS_CLOUD_CLIENT_ID"],
        "client_secret": environment["POLARS_CLOUD_CLIENT_SECRET"],
    }
    return httpx.post(page, data=form, trust_env=False)


def log_in(emulator: RunningEmulator) -> dict[str, str]:
    _, login = ask(emulator, "auth/device")
    confirm(emulator.environment, login["verification_uri_complete"])
    return collect(emulator, login)[1]


def status_of_call(emulator: RunningEmulator, token: str) -> int:
    headers = {**VERSIONS, "authorization": f"Bearer {token}"}
    url = f"{emulator.rest_url}/api/v1/user/me"
    return httpx.get(url, headers=headers, trust_env=False).status_code


def run_pc(emulator: RunningEmulator, config: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Run `pc` like a person with a terminal, but without a service account and a browser."""
    person = {**os.environ, **emulator.environment, "BROWSER": "true"}
    for name in ACCOUNT:
        del person[name]
    return subprocess.Popen(
        [Path(sys.executable).parent / "pc", *arguments],
        env=person | {"POLARS_CLOUD_CONFIG_DIR": str(config)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_person_logs_in_with_a_code_that_a_page_confirms(
    emulator_here: StartEmulator, tmp_path: Path
) -> None:
    # The client renews a token that expires in less than 10 s before each call.
    emulator = emulator_here(token_lifetime=timedelta(seconds=8))
    with run_pc(emulator, tmp_path, "login") as login:
        assert login.stdout is not None
        output = ""
        while (match := re.search(r"^http\S+/portal/login/(\S+)$", output, re.M)) is None:
            output += login.stdout.readline()
        assert f"Is <b>{match[1]}</b> the code" in httpx.get(match[0], trust_env=False).text
        assert "You are logged in" in confirm(emulator.environment, match[0]).text
        assert "Successfully logged in" in login.communicate(timeout=60)[0]
    with run_pc(emulator, tmp_path, "workspace", "list") as listing:
        assert "playground" in listing.communicate(timeout=60)[0]


def test_login_waits_until_it_is_confirmed_or_expires(emulator_here: StartEmulator) -> None:
    clock = Clock()
    emulator = emulator_here(clock=clock)
    _, login = ask(emulator, "auth/device")
    for seconds, error in ((0, "authorization_pending"), (119, "authorization_pending")):
        clock.advance(timedelta(seconds=seconds))
        status, answer = collect(emulator, login)
        assert (status, answer["error"]) == (400, error)
    clock.advance(timedelta(seconds=1))
    assert collect(emulator, login)[1]["error"] == "expired_token"
    page = confirm(emulator.environment, login["verification_uri_complete"])
    assert page.status_code == 404
    assert f"Login code {login['user_code']} is unknown or has expired" in page.text


def test_code_gives_tokens_once(emulator: RunningEmulator) -> None:
    _, login = ask(emulator, "auth/device")
    confirm(emulator.environment, login["verification_uri_complete"])
    status, tokens = collect(emulator, login)
    assert status == 200
    assert status_of_call(emulator, tokens["access_token"]) == 200
    assert collect(emulator, login)[1]["error"] == "expired_token"


@pytest.mark.parametrize("wrong", ["POLARS_CLOUD_CLIENT_ID", "POLARS_CLOUD_CLIENT_SECRET"])
def test_page_confirms_no_code_without_a_secret(emulator: RunningEmulator, wrong: str) -> None:
    _, login = ask(emulator, "auth/device")
    page = login["verification_uri_complete"]
    refused = confirm({**emulator.environment, wrong: "<wrong>"}, page)
    assert refused.status_code == 401
    assert "Unknown client id or wrong client secret" in refused.text
    assert emulator.environment["POLARS_CLOUD_CLIENT_SECRET"] not in refused.text
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert httpx.post(page, content=b"\xff", headers=form, trust_env=False).status_code == 401
    assert collect(emulator, login)[1]["error"] == "authorization_pending"


def test_person_acts_as_the_account_whose_secret_it_was(emulator: RunningEmulator) -> None:
    client_id, secret = emulator.add_service_account("second")
    account = {"POLARS_CLOUD_CLIENT_ID": client_id, "POLARS_CLOUD_CLIENT_SECRET": secret}
    _, login = ask(emulator, "auth/device")
    confirm(account, login["verification_uri_complete"])
    _, tokens = collect(emulator, login)
    assert status_of_call(emulator, tokens["access_token"]) == 200
    assert emulator.journal()[-1]["account"] == client_id
    emulator.reset()
    refused = renew(emulator, tokens["refresh_token"])[1]["error_description"]
    assert refused == f"service account '{client_id}' was removed"


def test_reset_ends_the_logins_that_were_begun(emulator: RunningEmulator) -> None:
    _, login = ask(emulator, "auth/device")
    emulator.reset()
    assert collect(emulator, login)[1]["error"] == "expired_token"


def test_person_stays_logged_in_for_a_day(emulator_here: StartEmulator) -> None:
    clock = Clock()
    emulator = emulator_here(clock=clock)
    tokens = log_in(emulator)
    clock.advance(timedelta(hours=23))
    assert status_of_call(emulator, tokens["access_token"]) == 401
    _, renewed = renew(emulator, tokens["refresh_token"])
    assert status_of_call(emulator, renewed["access_token"]) == 200
    clock.advance(timedelta(hours=1))
    status, refused = renew(emulator, tokens["refresh_token"])
    assert (status, refused["error_description"]) == (401, "the refresh token has expired")
    assert renew(emulator, renewed["refresh_token"])[0] == 200


def test_a_token_serves_one_purpose(emulator: RunningEmulator) -> None:
    tokens = log_in(emulator)
    assert status_of_call(emulator, tokens["refresh_token"]) == 401
    _, refused = renew(emulator, tokens["access_token"])
    assert refused["error_description"] == "this refresh token was not issued by this emulator"


def test_revoked_person_is_not_logged_in_again(emulator: RunningEmulator) -> None:
    tokens = log_in(emulator)
    emulator.add_fault("GET user/me", "credentials_revoked")
    assert status_of_call(emulator, tokens["access_token"]) == 401
    assert renew(emulator, tokens["refresh_token"])[1]["error"] == "invalid_grant"
    _, login = ask(emulator, "auth/device")
    page = confirm(emulator.environment, login["verification_uri_complete"])
    assert "The client secret is revoked" in page.text
    assert collect(emulator, login)[1]["error"] == "authorization_pending"


@pytest.mark.parametrize("grant", ["", "client_credentials"])
def test_another_grant_is_refused(emulator: RunningEmulator, grant: str) -> None:
    status, refused = ask(emulator, "token", grant_type=grant)
    assert (status, refused["error"]) == (400, "unsupported_grant_type")


def test_no_code_and_no_token_is_shown(emulator: RunningEmulator) -> None:
    _, login = ask(emulator, "auth/device")
    confirm(emulator.environment, login["verification_uri_complete"])
    _, tokens = collect(emulator, login)
    shown = f"{emulator.journal()}{emulator.state()}"
    for secret in (login["user_code"], login["device_code"], *tokens.values()):
        assert secret == "Bearer" or secret not in shown
