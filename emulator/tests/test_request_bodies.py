"""Large requests: memory, disk and responses."""

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from emulator.tests.raw_calls import (
    COMPUTE_PLANE,
    CONTROL_PLANE,
    TOKEN_PATH,
    VERSIONS,
    WORKSPACE,
    access_token,
    admin_client,
    call_grpc,
)
from polars_cloud_emulator.protocol import request_bodies
from polars_cloud_emulator.testing import RunningEmulator

LARGE_MB = 50


@pytest.fixture
def usage_mb(emulator: RunningEmulator) -> Callable[[], dict[str, int]]:
    """Return a function that measures written bytes and peak memory of the emulator, in MB."""
    process = Path(f"/proc/{emulator.pid}")

    def measure() -> dict[str, int]:
        written = re.findall(r"wchar: (\d+)\d{6}", (process / "io").read_text())
        memory = re.findall(r"VmHWM:\s+(\d+)\d{3} kB", (process / "status").read_text())
        return {"written": sum(map(int, written)), "memory": sum(map(int, memory))}

    (process / "clear_refs").write_text("5")  # resets the peak of the memory
    before = measure()
    return lambda: {name: after - before[name] for name, after in measure().items()}


@pytest.mark.parametrize(
    ("path", "content_type", "status"),
    [
        (TOKEN_PATH, "application/x-www-form-urlencoded", 400),
        (TOKEN_PATH, "text/plain", 415),
        (f"{WORKSPACE}/compute/start", "application/json", 401),
        ("/_emulator/faults", "application/json", 401),
        ("/nothing", "application/json", 501),
    ],
)
def test_large_body_of_a_call_without_a_login_is_not_stored(
    emulator: RunningEmulator,
    usage_mb: Callable[[], dict[str, int]],
    path: str,
    content_type: str,
    status: int,
) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(LARGE_MB):
            yield b"a" * 1_000_000

    with httpx.Client(base_url=emulator.rest_url, headers=VERSIONS, trust_env=False) as client:
        answer = client.post(path, content=body(), headers={"content-type": content_type})
    assert answer.status_code == status
    assert max(usage_mb().values()) < LARGE_MB / 4


@pytest.mark.parametrize("plane", [COMPUTE_PLANE, CONTROL_PLANE])
def test_plan_of_a_call_without_a_login_is_not_stored(
    emulator: RunningEmulator, usage_mb: Callable[[], dict[str, int]], plane: str
) -> None:
    path, plan = f"{plane}/SubmitQuery", bytes(LARGE_MB * 1_000_000)
    answer = call_grpc(emulator.environment, path, VERSIONS, plan)
    assert answer == (grpc.StatusCode.UNAUTHENTICATED, "no access token")
    assert max(usage_mb().values()) < LARGE_MB / 4


def test_large_body_is_refused_with_its_limit(
    emulator: RunningEmulator, rest: httpx.Client
) -> None:
    body = {"name": "x" * 10_000_000}
    with admin_client(emulator.environment) as admin:
        answers = [rest.post(f"{WORKSPACE}/manifest", json=body), admin.post("clock", json=body)]
    for answer in answers:
        assert answer.status_code == 413
        assert "has more than 10,000,000 bytes" in answer.json()["message"]


def test_request_that_does_not_end_is_ended(
    emulator_here: Callable[..., RunningEmulator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_bodies, "MAX_DROPPED", 5_000_000)
    emulator = emulator_here()
    address = emulator.rest_url.removeprefix("http://")
    head = f"POST /nothing HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(address.split(":"), timeout=60) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"F4240\r\n%s\r\n" % (b"a" * 1_000_000)
        with pytest.raises(ConnectionError):
            connection.sendall(chunk * 100)
    assert access_token(emulator.environment)


def test_login_of_many_fields_is_refused(emulator: RunningEmulator) -> None:
    with httpx.Client(base_url=emulator.rest_url, trust_env=False) as client:
        answer = client.post(TOKEN_PATH, data={f"field_{n}": "x" for n in range(1_000)})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert "has more than 10,000 bytes" in answer.json()["error_description"]
