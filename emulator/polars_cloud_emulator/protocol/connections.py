"""The connections of calls, to be reset, and to be told when they end."""

import asyncio
import socket
import ssl
import struct
from contextvars import ContextVar
from typing import ClassVar, cast


class Connection(asyncio.Protocol):
    """The connection of a call, which hypercorn shows to no application."""

    current: ClassVar[ContextVar["Connection"]] = ContextVar("connection")

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        self.ended = asyncio.Event()

    def reset(self) -> None:
        connection: socket.socket = self._transport.get_extra_info("socket")
        # Without time to linger, the other side is sent RST in place of FIN.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Inherited by the task that hypercorn creates here, and by those of its calls.
        self.current.set(self)
        self._protocol.connection_made(transport)

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
