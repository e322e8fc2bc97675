"""A TLS port that also accepts connections without TLS, to answer them with a clear error."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from polars_cloud_emulator.model.errors import WrongState
from polars_cloud_emulator.protocol.grpc_transport import refusal_for

HANDSHAKE = b"\x16"
"""The first byte of every TLS connection."""
FIRST_BYTE_TIMEOUT = 60.0
"""Seconds until a connection that sends nothing is closed."""
SHUTDOWN_TIMEOUT = 0.5
"""Seconds to wait for a client's TLS shutdown. asyncio's default of 30 s would delay the stop."""
ACCEPT_PAUSE = 1.0
"""Seconds until the next accept after one failed, for example for lack of a file descriptor."""


class TlsListener:
    """Accepts connections, with TLS or without, until closed. Replaces ``asyncio.Server``."""

    def __init__(
        self,
        protocol_factory: Callable[[], asyncio.Protocol],
        listener: socket.socket,
        context: ssl.SSLContext,
    ) -> None:
        self._protocol_factory = protocol_factory
        self._listener = listener
        self._context = context
        self._starting: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())

    def close(self) -> None:
        for task in (self._accepting, *self._starting):
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._accepting, *self._starting, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            task = asyncio.create_task(self._start(connection))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self, connection: socket.socket) -> None:
        """Hand the connection to the protocol, through TLS if its first byte is a handshake."""
        tls: dict[str, Any] = {"ssl": self._context, "ssl_shutdown_timeout": SHUTDOWN_TIMEOUT}
        with contextlib.suppress(OSError):  # the client disconnected, or the handshake failed
            try:
                begins_with_tls = await _first_byte(connection) == HANDSHAKE
            except BaseException:
                connection.close()
                raise
            # This call closes the connection itself, also when it is canceled.
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol_factory, connection, **(tls if begins_with_tls else {})
            )


async def _first_byte(connection: socket.socket) -> bytes:
    """Return the first byte without consuming it; empty if the client closed the connection."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    connection.setblocking(False)
    loop.add_reader(connection, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), FIRST_BYTE_TIMEOUT)
    finally:
        loop.remove_reader(connection)
    return connection.recv(1, socket.MSG_PEEK)


class TlsOnlyMiddleware:
    """Refuses every request that reaches the TLS port without TLS.

    Parameters
    ----------
    port
        The TLS port.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["scheme"], scope["server"][1]) == (
            "http",
            self._port,
        ):
            error = WrongState("this port needs TLS; leave out insecure=True")
            await refusal_for(Request(scope), error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)
