"""The TLS port refuses calls without TLS with a clear error."""

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import httpx
import polars as pl
import pytest

from emulator.tests.command_line import Served
from emulator.tests.raw_calls import tls_client
from polars_cloud_emulator.testing import RunningEmulator

Address = tuple[str, int]


def tls_address(environment: dict[str, str]) -> Address:
    host, port = environment["POLARS_CLOUD_DOMAIN"].partition("@")[2].split(":")
    return host, int(port)


def test_insecure_connection_is_refused_with_a_clear_error(
    emulator: RunningEmulator, start_cluster: Callable[..., Any]
) -> None:
    context = start_cluster(insecure=True)
    with pytest.raises(RuntimeError, match="this port needs TLS; leave out insecure=True"):
        pl.LazyFrame({"x": [1]}).remote(context).execute()
    assert emulator.state()["queries"] == []
    assert emulator.state()["unmatched"] == []


def test_call_without_tls_is_refused_with_a_clear_error(emulator: RunningEmulator) -> None:
    host, port = tls_address(dict(emulator.environment))
    answer = httpx.post(f"http://{host}:{port}/realms/x", json={}, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("this port needs TLS")


def test_broken_connections_disturb_nobody(serve: Callable[..., Served]) -> None:
    served = serve("--port-base", 0)
    address = tls_address(dict(served.environment))
    with contextlib.ExitStack() as connections:
        for first_bytes in (b"", b"\x16", b"\x16\x03\x01\x00\x05hello", b"GET", *[b""] * 200):
            connection = connections.enter_context(socket.create_connection(address))
            connection.sendall(first_bytes)
        with tls_client(served.environment) as client:
            assert client.get("/_emulator/health").status_code == 200
        # These connections are still open when the emulator ends.
        assert served.stop() == (0, "", "")
