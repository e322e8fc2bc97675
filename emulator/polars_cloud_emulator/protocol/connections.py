"""The connections of calls, to be reset, and to be told when they end."""

import asyncio
import socket
import ssl
import struct
from contextvars import ContextVar
from typing import Any, ClassVar, cast


class Connection(asyncio.Protocol):
    """The connection of a call, which hypercorn shows to no application."""

    current: ClassVar[ContextVar["Connection"]] = ContextVar("connection")

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        self.ended = asyncio.Event()
        self.reason = ""
        """Words for the status line of the next answer."""

    def reset(self) -> None:
        connection: socket.socket = self._transport.get_extra_info("socket")
        # Without time to linger, the other side is sent RST in place of FIN.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Inherited by the task that hypercorn creates here, and by those of its calls.
        self.current.set(self)
        worded = _ReasonTransport(self._transport, self)
        self._protocol.connection_made(cast(asyncio.BaseTransport, worded))

    def data_received(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        self.ended.set()
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
        if isinstance(exc, ssl.SSLError):
            # Sent while the connection was being closed; hypercorn expects no error of TLS then.
            exc = ConnectionResetError(str(exc))
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


class _ReasonTransport:
    """A transport whose status lines have a reason: hypercorn writes none."""

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
