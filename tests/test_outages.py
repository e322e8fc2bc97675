"""`include/outages.py`: what passes is waited for, what does not is an error at once."""

import time
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowTaskTimeout
from airflow.sdk.execution_time.timeout import timeout as execution_timeout

from include.auth import authenticate
from include.outages import call, is_transient
from polars_cloud_emulator.testing import RunningEmulator


@pytest.fixture
def query(pc: ModuleType) -> Any:
    """A query that has ended."""
    ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    query = pl.LazyFrame({"x": [1]}).remote(ctx).execute(blocking=False)
    query.await_result()
    return query


def get_user() -> Any:
    from polars_cloud.constants import API_CLIENT

    return API_CLIENT.get_user()


def calls(emulator: RunningEmulator, name: str) -> int:
    return sum(entry["path"].endswith(f"/{name}") for entry in emulator.journal())


# What passes


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_gateways_http_error_is_waited_for(
    pc: ModuleType, emulator: RunningEmulator, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked = calls(emulator, "me")
    emulator.add_fault("GET user/me", "http_error", status=status)
    assert call(get_user).id
    assert calls(emulator, "me") == asked + 2
    assert "is out of order, and asked again" in caplog.text
    assert f"Status {status}" in caplog.text


def test_too_many_requests_are_waited_for() -> None:
    # The client itself asks five times, for ten seconds.
    assert is_transient(ValueError("Status 429 Too Many Requests with body: "))


@pytest.mark.parametrize("kind", ["connection_reset", "answer_lost"])
def test_a_lost_rest_call_is_repeated(pc: ModuleType, emulator: RunningEmulator, kind: str) -> None:
    emulator.add_fault("GET user/me", kind)
    assert call(get_user).id


@pytest.mark.parametrize("code", ["ABORTED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE"])
def test_a_scheduler_that_is_out_of_order_is_waited_for(
    query: Any, emulator: RunningEmulator, code: str
) -> None:
    emulator.add_fault("GetQueryStatus", "grpc_error", code=code, message="wait", times=2)
    assert call(query.get_status).is_done()
    assert calls(emulator, "GetQueryStatus") == 3


@pytest.mark.parametrize("kind", ["connection_reset", "answer_lost"])
def test_a_lost_grpc_call_is_repeated(query: Any, emulator: RunningEmulator, kind: str) -> None:
    emulator.add_fault("GetQueryStatus", kind)
    assert call(query.get_status).is_done()
    assert calls(emulator, "GetQueryStatus") == 2


def test_a_call_that_is_not_answered_is_left_to_itself_and_repeated(
    query: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "stall")
    assert call(query.get_status, timeout=0.5).is_done()
    assert calls(emulator, "GetQueryStatus") == 2


# What does not pass


@pytest.mark.parametrize("status", [400, 403, 404, 409, 422])
def test_a_refusal_is_an_error_at_once(
    pc: ModuleType, emulator: RunningEmulator, status: int
) -> None:
    asked = calls(emulator, "me")
    emulator.add_fault("GET user/me", "http_error", status=status, message="for good", times=9)
    with pytest.raises(Exception, match="for good"):
        call(get_user)
    assert calls(emulator, "me") == asked + 1


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION"]
)
def test_a_schedulers_refusal_is_an_error_at_once(
    query: Any, emulator: RunningEmulator, code: str
) -> None:
    emulator.add_fault("GetQueryStatus", "grpc_error", code=code, message="for good", times=9)
    with pytest.raises(RuntimeError, match="for good"):
        call(query.get_status)
    assert calls(emulator, "GetQueryStatus") == 1


def test_an_error_of_the_users_own_comes_through_as_it_is() -> None:
    error = KeyError("mine")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as raised:
        call(fail)
    assert raised.value is error


# The budget


def test_an_outage_that_outlasts_the_budget_is_an_error(
    query: Any, emulator: RunningEmulator
) -> None:
    fault = {"operation": "GetQueryStatus", "kind": "grpc_error", "code": "UNAVAILABLE"}
    emulator.add_fault(**fault, message="at first")
    emulator.add_fault(**fault, message="at last", times=1_000)
    with pytest.raises(RuntimeError, match="at last"):
        call(query.get_status, budget=0.5)
    assert 2 <= calls(emulator, "GetQueryStatus") <= 4


def test_without_a_budget_the_first_failure_is_final(query: Any, emulator: RunningEmulator) -> None:
    emulator.add_fault("GetQueryStatus", "grpc_error", code="UNAVAILABLE", message="down")
    with pytest.raises(RuntimeError, match="down"):
        call(query.get_status, budget=0)


def test_a_last_call_that_is_not_answered_is_a_timeout_error(
    query: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "stall")
    with pytest.raises(TimeoutError, match=r"gave no answer for 0\.3 s"):
        call(query.get_status, timeout=0.3, budget=0)


def test_a_timeout_error_of_the_call_itself_keeps_its_words() -> None:
    def time_out() -> None:
        raise TimeoutError("the client's own")

    with pytest.raises(TimeoutError, match="the client's own"):
        call(time_out, budget=0)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_airflows_time_out_reaches_a_task_whose_call_is_not_answered(
    query: Any, emulator: RunningEmulator, timeout: float | None
) -> None:
    emulator.add_fault("GetQueryStatus", "stall")
    began = time.monotonic()
    with pytest.raises(AirflowTaskTimeout), execution_timeout(0.5):
        call(query.get_status, timeout=timeout)
    assert time.monotonic() - began < 10


# The login


@authenticate
def get_user_logged_in() -> Any:
    return call(get_user)


@authenticate
def get_status_logged_in(query: Any) -> Any:
    return call(query.get_status)


def test_a_login_that_has_expired_is_renewed_for_a_grpc_call(
    query: Any, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.add_fault("GetQueryStatus", "tokens_expire")
    logins = calls(emulator, "token")
    assert get_status_logged_in(query).is_done()
    assert calls(emulator, "token") == logins + 2
    assert "no longer accepts this login, which is renewed" in caplog.text


def test_a_login_that_has_expired_is_renewed_for_a_rest_call(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GET user/me", "tokens_expire", nth=2)  # the first is the login's own
    logins = calls(emulator, "token")
    assert get_user_logged_in().id
    assert calls(emulator, "token") == logins + 2


def test_a_login_that_expires_during_an_outage_is_renewed_as_well(
    query: Any, emulator: RunningEmulator
) -> None:
    down = {"operation": "GetQueryStatus", "kind": "grpc_error", "code": "UNAVAILABLE"}
    emulator.add_fault(**down, message="before")
    emulator.add_fault("GetQueryStatus", "tokens_expire")
    emulator.add_fault(**down, message="after")
    assert get_status_logged_in(query).is_done()
    assert calls(emulator, "GetQueryStatus") == 4


def test_a_renewal_that_meets_an_outage_is_repeated(query: Any, emulator: RunningEmulator) -> None:
    emulator.add_fault("GetQueryStatus", "tokens_expire")
    emulator.add_fault("POST token", "http_error", status=503, nth=2)  # the first is the login
    assert get_status_logged_in(query).is_done()


def test_a_renewal_that_is_refused_is_not_tried_again(
    query: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "credentials_revoked")
    logins = calls(emulator, "token")
    with pytest.raises(AirflowFailException, match="was refused by Polars Cloud"):
        get_status_logged_in(query)
    assert calls(emulator, "token") == logins + 2


def test_a_login_is_renewed_once_for_a_call_that_is_refused_all_the_same(
    query: Any, emulator: RunningEmulator
) -> None:
    unauthenticated = {"kind": "grpc_error", "code": "UNAUTHENTICATED", "message": "not you"}
    emulator.add_fault("GetQueryStatus", times=9, **unauthenticated)
    with pytest.raises(RuntimeError, match="not you"):
        get_status_logged_in(query)
    assert calls(emulator, "GetQueryStatus") == 2
