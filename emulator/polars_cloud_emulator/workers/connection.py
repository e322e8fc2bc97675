"""Frames between two processes: a 4-byte big-endian length, then the content."""

import socket
import struct

LENGTH = struct.Struct(">I")


class Connection:
    """One end of a pair of sockets."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._received = bytearray()
        self.fileno = end.fileno
        self.close = end.close

    @property
    def has_part(self) -> bool:
        """True if a part of a frame has been received."""
        return bool(self._received)

    def send(self, frame: bytes) -> None:
        self._end.sendall(LENGTH.pack(len(frame)) + frame)

    def receive(self) -> bytes:
        """Return the next frame.

        Raises
        ------
        EOFError
            The other end is closed.
        """
        while (frame := self.receive_part()) is None:
            pass
        return frame

    def receive_part(self) -> bytes | None:
        """Receive more bytes of a frame; return the frame when it is complete, else None.

        Raises
        ------
        EOFError
            The other end is closed.
        """
        missing = self._missing()
        if missing:
            part = self._end.recv(min(missing, 2**20))
            if not part:
                raise EOFError
            self._received += part
        if self._missing():
            return None
        frame = bytes(self._received[LENGTH.size :])
        self._received.clear()
        return frame

    def _missing(self) -> int:
        if len(self._received) < LENGTH.size:
            return LENGTH.size - len(self._received)
        [length] = LENGTH.unpack_from(self._received)
        return LENGTH.size + int(length) - len(self._received)
