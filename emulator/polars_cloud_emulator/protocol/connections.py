"""Connections of requests: reset them, and wait for their end."""

import asyncio
import socket
import ssl
import struct
from contextvars import ContextVar
from typing import Any, ClassVar, cast


class Connection(asyncio.Protocol):
    """The connection of a request, which hypercorn does not expose to the application."""

    current: ClassVar[ContextVar["Connection"]] = ContextVar("connection")

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        self.ended = asyncio.Event()
        self.reason = ""
        """Reason phrase for the status line of the next response."""

    def reset(self) -> None:
        connection: socket.socket = self._transport.get_extra_info("socket")
        # A linger time of zero sends RST instead of FIN.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Inherited by the task that hypercorn creates next, and by its requests' tasks.
        self.current.set(self)
        with_reason = _ReasonTransport(self._transport, self)
        self._protocol.connection_made(cast(asyncio.BaseTransport, with_reason))

    def data_received(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        self.ended.set()
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
        if isinstance(exc, ssl.SSLError):
            # Data that arrives while the connection closes is a TLS error for Python, which
            # hypercorn does not handle.
            exc = ConnectionResetError(str(exc))
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


class _ReasonTransport:
    """A transport that adds the reason phrase to the status line, which hypercorn leaves out."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection

    def write(self, data: bytes) -> None:
        if self._connection.reason and data.startswith(b"HTTP/1.1 "):
            data = data.replace(b" \r\n", f" {self._connection.reason}\r\n".encode(), 1)
            self._connection.reason = ""
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
