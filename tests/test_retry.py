"""`cloud/retry.py`: temporary errors are retried, others are raised at once."""

import signal
import sys
import time
from concurrent.futures import Future
from threading import Event, get_ident, main_thread
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowTaskTimeout
from airflow.sdk.execution_time.timeout import timeout as execution_timeout

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote.cloud.retry import (
    in_thread,
    is_transient,
    retry,
    start_thread,
    time_left,
    time_limit,
)
from polars_remote.cloud.session import CloudSession
from polars_remote.errors import LoginRefusedError
from polars_remote.ownership.scope import current_scope
from tests.observed import calls
from tests.tries import StartTry, Supervisor


@pytest.fixture
def query(pc: ModuleType) -> Any:
    """A query that has ended."""
    ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    query = pl.LazyFrame({"x": [1]}).remote(ctx).execute(blocking=False)
    query.await_result()
    return query


@pytest.fixture
def session(pc: ModuleType, supervisor: Supervisor) -> CloudSession:
    """Session of a task that has logged in."""
    session = CloudSession("polars_cloud")
    session.log_in()
    return session


def get_user() -> Any:
    from polars_cloud.constants import API_CLIENT

    return API_CLIENT.get_user()


# What passes


@pytest.mark.parametrize("status", [408, 425, 500, 502, 503, 504])
def test_an_http_error_that_may_pass_is_waited_for(
    pc: ModuleType, emulator: RunningEmulator, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked = calls(emulator, "me")
    emulator.add_fault("GET user/me", "http_error", status=status)
    assert retry(get_user).id
    assert calls(emulator, "me") == asked + 2
    assert "Polars Cloud is unavailable, retrying in" in caplog.text
    assert f"Status {status}" in caplog.text


def test_too_many_requests_are_waited_for() -> None:
    # The client itself tries five times, within ten seconds.
    assert is_transient(ValueError("Status 429 Too Many Requests with body: "))


@pytest.mark.parametrize("kind", ["connection_reset", "answer_lost"])
def test_a_lost_rest_call_is_repeated(pc: ModuleType, emulator: RunningEmulator, kind: str) -> None:
    emulator.add_fault("GET user/me", kind)
    assert retry(get_user).id


@pytest.mark.parametrize(
    "code",
    [
        "ABORTED",
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "INTERNAL",
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
        "UNKNOWN",
    ],
)
def test_a_scheduler_that_is_unavailable_is_waited_for(
    query: Any, emulator: RunningEmulator, code: str
) -> None:
    emulator.add_fault("GetQueryStatus", "grpc_error", code=code, message="wait", times=2)
    assert retry(query.get_status).is_done()
    assert calls(emulator, "GetQueryStatus") == 3


@pytest.mark.parametrize("kind", ["connection_reset", "answer_lost"])
def test_a_lost_grpc_call_is_repeated(query: Any, emulator: RunningEmulator, kind: str) -> None:
    emulator.add_fault("GetQueryStatus", kind)
    assert retry(query.get_status).is_done()
    assert calls(emulator, "GetQueryStatus") == 2


def test_a_call_without_a_reply_is_abandoned_and_repeated(
    query: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "stall")
    assert retry(query.get_status, call_timeout=0.5).is_done()
    assert calls(emulator, "GetQueryStatus") == 2


# What does not pass


@pytest.mark.parametrize("status", [400, 403, 404, 409, 422, 501, 505])
def test_a_refusal_is_an_error_at_once(
    pc: ModuleType, emulator: RunningEmulator, status: int
) -> None:
    asked = calls(emulator, "me")
    emulator.add_fault("GET user/me", "http_error", status=status, message="for good", times=9)
    with pytest.raises(Exception, match="for good"):
        retry(get_user)
    assert calls(emulator, "me") == asked + 1


@pytest.mark.parametrize(
    "text", ["Internal error", "Status 503", "transport error", "Error getting access token"]
)
def test_a_refusal_is_an_error_at_once_whatever_its_words(
    pc: ModuleType, emulator: RunningEmulator, text: str
) -> None:
    asked = calls(emulator, "me")
    message = f"bad request: {text} in your plan"
    emulator.add_fault("GET user/me", "http_error", status=400, message=message, times=9)
    with pytest.raises(Exception, match=message):
        retry(get_user)
    assert calls(emulator, "me") == asked + 1


def test_a_failed_query_is_an_error_at_once_whatever_its_words() -> None:
    assert not is_transient(RuntimeError("Internal error, of the user's own function"))
    assert not is_transient(pl.exceptions.ComputeError("no column Status 503"))


@pytest.mark.parametrize("status", [400, 403, 404, 501, 505])
def test_a_gateways_refusal_is_an_error_at_once(
    pc: ModuleType, emulator: RunningEmulator, status: int
) -> None:
    asked = calls(emulator, "me")
    emulator.add_fault("GET user/me", "http_error", status=status, times=9)
    with pytest.raises(Exception, match=r"no service|\d{3}"):
        retry(get_user)
    assert calls(emulator, "me") == asked + 1


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION"]
)
def test_a_schedulers_refusal_is_an_error_at_once(
    query: Any, emulator: RunningEmulator, code: str
) -> None:
    emulator.add_fault("GetQueryStatus", "grpc_error", code=code, message="for good", times=9)
    with pytest.raises(RuntimeError, match="for good"):
        retry(query.get_status)
    assert calls(emulator, "GetQueryStatus") == 1


def test_an_error_of_the_users_own_comes_through_as_it_is() -> None:
    error = KeyError("mine")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as raised:
        retry(fail)
    assert raised.value is error


# The budget


@pytest.mark.usefixtures("short_outages")
def test_an_outage_that_outlasts_the_budget_is_an_error(
    query: Any, emulator: RunningEmulator
) -> None:
    fault = {"operation": "GetQueryStatus", "kind": "grpc_error", "code": "UNAVAILABLE"}
    for number in range(1, 9):
        emulator.add_fault(**fault, message=f"refusal {number}")
    with pytest.raises(RuntimeError) as raised:
        retry(query.get_status)
    # A slow machine makes fewer calls.
    assert 1 <= calls(emulator, "GetQueryStatus") <= 4
    assert f"refusal {calls(emulator, 'GetQueryStatus')}" in str(raised.value)


def test_an_outage_that_ends_just_within_the_budget_is_survived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("polars_remote.cloud.retry.OUTAGE_SECONDS", 2.0)
    began = time.monotonic()

    def is_back() -> bool:
        if (
            time.monotonic() < began + 1.9
        ):  # the delays double: attempts at 0.2, 0.6 and 1.4 s; the next would be too late
            raise ConnectionError
        return True

    assert retry(is_back)


def test_an_outage_that_outlasts_the_time_limit_is_an_error(
    query: Any, emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each of these calls is the last one within the limit.
    monkeypatch.setattr("polars_remote.cloud.retry.LAST_ATTEMPT_SECONDS", 60.0)
    fault = {"kind": "grpc_error", "code": "UNAVAILABLE", "message": "down", "times": 1_000}
    emulator.add_fault("GetQueryStatus", **fault)
    with time_limit(60.0):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="down"):
                retry(query.get_status)
    assert calls(emulator, "GetQueryStatus") == 3


def test_a_time_limit_ends_with_its_body(query: Any, emulator: RunningEmulator) -> None:
    with time_limit(0):
        pass
    emulator.add_fault("GetQueryStatus", "grpc_error", code="UNAVAILABLE", message="down")
    assert retry(query.get_status).is_done()


def test_an_inner_time_limit_ends_before_the_outer_one_continues() -> None:
    assert time_left(9.0) == 9.0
    with time_limit(60.0):
        assert time_left(9.0) == 9.0
        with time_limit(1.0):
            assert time_left(9.0) <= 1.0
        assert 1.0 < time_left(90.0) <= 60.0
    assert time_left(90.0) == 90.0


def test_a_time_limit_holds_in_a_thread_that_is_started_in_its_body() -> None:
    with time_limit(1.0):
        assert start_thread(lambda: time_left(9.0)).result(10) <= 1.0


def test_a_call_without_a_reply_ends_with_the_time_limit(
    query: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "stall", times=1_000)
    with time_limit(0.5), pytest.raises(TimeoutError, match=r"no reply for 0\.\d s"):
        retry(query.get_status, call_timeout=None)


@pytest.mark.usefixtures("short_outages")
def test_a_last_call_without_a_reply_is_a_timeout_error(
    query: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "stall", times=1_000)
    with pytest.raises(TimeoutError, match=r"no reply for 0\.3 s"):
        retry(query.get_status, call_timeout=0.3)


@pytest.mark.usefixtures("short_outages")
def test_a_timeout_error_of_the_call_itself_keeps_its_words() -> None:
    def time_out() -> None:
        raise TimeoutError("the client's own")

    with pytest.raises(TimeoutError, match="the client's own"):
        retry(time_out)


@pytest.mark.parametrize("call_timeout", [None, 60.0])
def test_airflows_time_out_reaches_a_task_whose_call_has_no_reply(
    query: Any, emulator: RunningEmulator, call_timeout: float | None
) -> None:
    emulator.add_fault("GetQueryStatus", "stall")
    began = time.monotonic()
    with pytest.raises(AirflowTaskTimeout), execution_timeout(0.5):
        retry(query.get_status, call_timeout=call_timeout)
    assert time.monotonic() - began < 10


# The login


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "http_error", "status": 429},
        {"kind": "http_error", "status": 500},
        {"kind": "http_error", "status": 503},
        {"kind": "connection_reset"},
        {"kind": "answer_lost"},
    ],
    ids=["429", "500", "503", "reset", "lost"],
)
@pytest.mark.parametrize("operation", ["POST token", "GET user/me"])
def test_an_outage_at_the_login_is_waited_for(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_try: StartTry,
    operation: str,
    fault: dict[str, Any],
) -> None:
    emulator.add_fault(operation, **fault)
    with start_try():
        assert current_scope().session.call(get_user).id
    assert emulator.state()["faults"] == []


def test_a_login_that_has_expired_is_renewed_for_a_grpc_call(
    query: Any, session: CloudSession, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.add_fault("GetQueryStatus", "tokens_expire")
    logins = calls(emulator, "token")
    assert session.call(query.get_status).is_done()
    assert calls(emulator, "token") == logins + 1
    assert "Login expired, logging in again" in caplog.text


def test_a_login_that_has_expired_is_renewed_for_a_rest_call(
    session: CloudSession, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GET user/me", "tokens_expire")
    logins = calls(emulator, "token")
    assert session.call(get_user).id
    assert calls(emulator, "token") == logins + 1


def test_a_login_that_expires_during_an_outage_is_renewed_as_well(
    query: Any, session: CloudSession, emulator: RunningEmulator
) -> None:
    down = {"operation": "GetQueryStatus", "kind": "grpc_error", "code": "UNAVAILABLE"}
    emulator.add_fault(**down, message="before")
    emulator.add_fault("GetQueryStatus", "tokens_expire")
    emulator.add_fault(**down, message="after")
    assert session.call(query.get_status).is_done()
    assert calls(emulator, "GetQueryStatus") == 4


def test_a_renewal_that_meets_an_outage_is_repeated(
    query: Any, session: CloudSession, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "tokens_expire")
    emulator.add_fault("POST token", "http_error", status=503)
    assert session.call(query.get_status).is_done()


def test_a_renewal_that_is_refused_is_not_tried_again(
    query: Any, session: CloudSession, emulator: RunningEmulator
) -> None:
    emulator.add_fault("GetQueryStatus", "credentials_revoked")
    logins = calls(emulator, "token")
    with pytest.raises(LoginRefusedError, match="was refused by Polars Cloud"):
        session.call(query.get_status)
    assert calls(emulator, "token") == logins + 1


def test_a_login_is_renewed_once_for_a_call_that_is_refused_all_the_same(
    query: Any, session: CloudSession, emulator: RunningEmulator
) -> None:
    unauthenticated = {"kind": "grpc_error", "code": "UNAUTHENTICATED", "message": "not you"}
    emulator.add_fault("GetQueryStatus", times=9, **unauthenticated)
    with pytest.raises(RuntimeError, match="not you"):
        session.call(query.get_status)
    assert calls(emulator, "GetQueryStatus") == 2


def test_a_renewal_and_the_call_after_it_survive_an_outage_each(
    query: Any,
    session: CloudSession,
    emulator: RunningEmulator,
) -> None:
    emulator.add_fault("GetQueryStatus", "tokens_expire")
    emulator.add_fault("POST token", "connection_reset")
    emulator.add_fault("GetQueryStatus", "connection_reset")
    assert session.call(query.get_status).is_done()
    assert emulator.state()["faults"] == []


# Threads


def test_a_signal_that_meets_another_thread_interrupts_a_wait() -> None:
    class Killed(BaseException):
        pass

    def raise_killed(*_: object) -> None:
        raise Killed

    reply, has_returned = Event(), Event()

    def is_waiting() -> bool:
        waits = sys._current_frames()[main_thread().ident or 0].f_back
        return waits is not None and waits.f_code is Future.result.__code__

    def call() -> None:
        eventually(is_waiting)
        signal.pthread_kill(get_ident(), signal.SIGTERM)
        reply.wait(10)
        has_returned.set()

    before = signal.signal(signal.SIGTERM, raise_killed)
    try:
        with pytest.raises(Killed):
            in_thread(call)
        assert not has_returned.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
        reply.set()
