"""Malformed calls are refused with a clear error, and are not logged."""

import socket
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import polars as pl
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection

from emulator.tests.command_line import Served
from emulator.tests.raw_calls import (
    CLUSTER,
    COMPUTE_PLANE,
    CONTROL_PLANE,
    TOKEN_PATH,
    VERSIONS,
    WORKSPACE,
    access_token,
    call_grpc,
    rest_client,
    tls_client,
)
from polars_cloud_emulator.testing import RunningEmulator

JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
HEADER = pl.LazyFrame().serialize()[:79]


def field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field of a protobuf message, shorter than 16,384 bytes."""
    return bytes([number << 3 | 2, len(content) & 127 | 128, len(content) >> 7]) + content


MESSAGES = {
    "a field longer than the message": b"\x0a\xff",
    "a length beyond any memory": b"\x0a" + b"\x80" * 10 + b"\x01",
    "a number in place of a message": b"\x08\x01",
    "a group": b"\x0b",
    "a wire type that does not exist": b"\x0f",
    "text that is not UTF-8": field(1, field(1, b"\xff\xfe")),
    "an id that is no UUID": field(1, field(1, b"not a UUID")),
    "no id": b"",
}
SUBMISSIONS = {
    "an engine that does not exist": field(2, b"\x08\x63"),
    "a priority beyond 32 bits": field(2, b"\x58" + b"\xff" * 8 + b"\x01"),
    "flags beyond 32 bits": field(2, b"\x38" + b"\xff" * 8 + b"\x01"),
    "no plan": b"",
    "a plan without a document": field(3, HEADER),
    "a plan that is no document": field(3, HEADER + b"\xc1"),
    "a plan of another form": field(3, HEADER + b"\x80"),
    "a plan whose document is a number": field(3, HEADER + b"\x01"),
    "a plan without a sink": field(3, pl.LazyFrame().serialize()),
    "a label that is not UTF-8": field(4, field(1, field(1, b"\xff"))),
}


@pytest.fixture
def headers(emulator: RunningEmulator) -> dict[str, str]:
    return {**VERSIONS, "authorization": f"Bearer {access_token(emulator.environment)}"}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
@pytest.mark.parametrize(
    "method", ["GetQueryStatus", "GetQueryResult", "GetQueryPlans", "CancelQuery"]
)
def test_malformed_reference_is_an_invalid_argument(
    emulator: RunningEmulator, headers: dict[str, str], method: str, message: bytes
) -> None:
    path = f"{COMPUTE_PLANE}/{method}"
    status, text = call_grpc(emulator.environment, path, headers, message)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert text


@pytest.mark.parametrize("message", SUBMISSIONS.values(), ids=SUBMISSIONS)
def test_malformed_submission_is_an_invalid_argument(
    emulator: RunningEmulator, headers: dict[str, str], start_cluster: Any, message: bytes
) -> None:
    cluster_id = start_cluster(connection_mode="proxy")._compute_id
    cluster = field(1, field(1, str(cluster_id).encode()))
    path = f"{CONTROL_PLANE}/SubmitQuery"
    status, text = call_grpc(emulator.environment, path, headers, cluster + message)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert text
    assert emulator.state()["queries"] == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (field(2, b"\x58" + b"\xff" * 8 + b"\x01"), "priority must be a 32-bit integer"),
        (field(2, b"\x38" + b"\xff" * 8 + b"\x01"), "optimization_flags must fit into 32 bits"),
        (field(2, field(9, b"\x08\x00")), "min_workers must be from 1 to 4294967295, not 0"),
        (field(2, field(9, b"\x10\x00")), "max_workers must be from 1 to 4294967295, not 0"),
        (field(2, field(9, b"\x08" + b"\xff" * 8 + b"\x01")), "min_workers must be from 1 to 429"),
        (field(2, field(9, b"\x08\x03\x10\x02")), "(3) must not be greater than max_workers (2)"),
        (field(4, field(1, b"")), "label '' must have from 1 to 32 bytes"),
        (field(4, field(1, field(1, b"x" * 33))), "must have from 1 to 32 bytes"),
        (field(4, field(1, field(1, b"a\n"))), "label 'a\\n' must not have control characters"),
        (field(4, field(1, field(1, b"a "))), "label 'a ' must not have control characters"),
        (b"\x22\xc3\x01" + b"\x0a\x01\x61" * 65, "at most 64 labels"),
    ],
)
def test_submission_that_the_client_would_not_make_is_refused_with_a_clear_error(
    emulator: RunningEmulator,
    headers: dict[str, str],
    start_cluster: Any,
    message: bytes,
    expected: str,
) -> None:
    cluster_id = start_cluster(connection_mode="proxy")._compute_id
    cluster = field(1, field(1, str(cluster_id).encode()))
    path = f"{CONTROL_PLANE}/SubmitQuery"
    status, said = call_grpc(emulator.environment, path, headers, cluster + message)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert expected in said


@pytest.mark.parametrize("name", ["page", "limit"])
@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "", "9" * 5000])
def test_invalid_count_is_refused(rest: httpx.Client, name: str, value: str) -> None:
    answer = rest.get(f"{WORKSPACE}/query", params={name: value})
    assert answer.status_code == 400
    assert answer.json()["message"].startswith(f"{name} must be a whole number from 1, not '")


@pytest.mark.parametrize(
    "body", [b"\xff\xfe", b'{"name": "\xff"}', b"[" * 100_000, b'{"name": "\\ud800"}', b""]
)
@pytest.mark.parametrize("path", ["/compute/start", "/manifest", "/manifest/start"])
def test_body_that_is_not_json_is_refused(rest: httpx.Client, path: str, body: bytes) -> None:
    answer = rest.post(f"{WORKSPACE}{path}", content=body, headers=JSON)
    assert answer.status_code == 400
    assert "cannot decode the body" in answer.json()["message"]


def test_error_message_cannot_end_the_status_line(emulator: RunningEmulator) -> None:
    answer = httpx.get(f"{emulator.rest_url}/x%0d%0aset-cookie:%20a=b%00\u00fc", trust_env=False)
    assert answer.reason_phrase == "the emulator does not support GET /xset-cookie: a=b "
    assert "set-cookie" not in answer.headers


def test_login_that_is_not_utf8_is_refused(emulator: RunningEmulator) -> None:
    with tls_client(emulator.environment) as client:
        answer = client.post(TOKEN_PATH, content=b"username=\xff", headers=FORM)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


def test_malformed_calls_leave_no_traceback(serve: Callable[..., Served]) -> None:
    served = serve("--port-base", 0)
    headers = {**VERSIONS, "authorization": f"Bearer {access_token(served.environment)}"}
    for message in [*MESSAGES.values(), *SUBMISSIONS.values()]:
        for method in (f"{COMPUTE_PLANE}/GetQueryResult", f"{CONTROL_PLANE}/SubmitQuery"):
            call_grpc(served.environment, method, headers, message)
    with rest_client(served.environment) as rest:
        rest.get(f"{WORKSPACE}/query", params={"page": "abc"})
        rest.post(f"{WORKSPACE}/compute/start", content=b'{"x": "\xff"}', headers=JSON)
        rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER | {"idle_timeout_mins": 10**18})
    with tls_client(served.environment) as client:
        client.post(TOKEN_PATH, content=b"username=\xff", headers=FORM)
    assert served.stop() == (0, "", "")


def test_malformed_request_is_logged_in_one_line(
    serve: Callable[..., Served],
) -> None:
    served = serve("--port-base", 0)
    address = served.rest_url.removeprefix("http://")
    client = H2Connection(H2Configuration(header_encoding=None))
    client.initiate_connection()
    request = {
        b":method": b"GET",
        b":scheme": b"http",
        b":authority": address.encode(),
        b":path": "/caf\u00e9".encode(),
    }
    client.send_headers(1, list(request.items()), end_stream=True)
    with socket.create_connection(address.split(":"), timeout=30) as connection:
        connection.sendall(client.data_to_send())
        while connection.recv(10_000):
            pass
    output = "A connection was closed, because its data is not valid HTTP (UnicodeDecodeError)\n"
    assert served.stop() == (0, "", output)
