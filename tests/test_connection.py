"""The *Test* button of a Connection of type *Polars Cloud*, and its messages."""

import json

import pytest

from polars_cloud_emulator.testing import RunningEmulator
from polars_remote.connection import PolarsCloudHook

SECRET = "a-secret-of-nobody"


def press_test(
    monkeypatch: pytest.MonkeyPatch, login: str = "", password: str = "", **extra: object
) -> tuple[bool, str]:
    account = {"conn_type": "polars_cloud", "login": login, "password": password, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_TRIED", json.dumps(account))
    return PolarsCloudHook("tried").test_connection()


def test_a_login_that_works_and_one_that_is_refused(
    monkeypatch: pytest.MonkeyPatch, emulator: RunningEmulator
) -> None:
    login, password = (
        emulator.environment[f"POLARS_CLOUD_CLIENT_{name}"] for name in ("ID", "SECRET")
    )
    assert press_test(monkeypatch, login, password) == (True, "Polars Cloud accepts this login")
    refused = (False, "Polars Cloud refuses this client ID and client secret")
    assert press_test(monkeypatch, login, SECRET) == refused


def test_a_polars_cloud_that_is_out_of_reach_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POLARS_CLOUD_API_ADDR", "http://127.0.0.1:9")
    monkeypatch.setenv("POLARS_CLOUD_DOMAIN", "nobody@127.0.0.1:9")
    works, message = press_test(monkeypatch, "somebody", SECRET)
    assert not works
    assert message.startswith("Could not log in to Polars Cloud: ")
    assert "Connection refused" in message
    assert "pc login" not in message
    assert SECRET not in message


def test_a_connection_to_clusters_of_your_own_alone_has_nothing_to_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert press_test(monkeypatch, headers={"authorization": SECRET}) == (
        False,
        "Nothing to test: a Connection for clusters of your own has no login",
    )
