"""The HTTP/1.1 server of the S3 port, with keep-alive and one thread per connection."""

import contextlib
import io
import re
import socket
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moto.moto_server.werkzeug_app import MotoRequestHandler
from werkzeug.serving import ThreadedWSGIServer
from werkzeug.wsgi import ClosingIterator, FileWrapper

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

STOP_CHECK_SECONDS = 0.05
MAX_CONNECTIONS = 512
"""Maximum open connections; further ones are closed at once."""
SILENCE_SECONDS = 300
"""Seconds until an idle connection is closed."""
MAX_UNREAD = 64 * 2**20
"""Maximum bytes of a refused body that are read and dropped, to keep the connection usable."""
PIECE = 2**20


class S3Server:
    """Serves a WSGI application on a listening socket."""

    def __init__(self, listener: socket.socket, application: "WSGIApplication") -> None:
        host, port = listener.getsockname()[:2]
        self._server = _Server(host, port, application, _Connection, fd=listener.fileno())
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": STOP_CHECK_SECONDS},
            name="object-store",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and close every connection."""
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()


class _Server(ThreadedWSGIServer):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._open: set[socket.socket] = set()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self._open) < MAX_CONNECTIONS

    def finish_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            self._open.discard(request)

    def end_connections(self) -> None:
        for connection in self._open.copy():
            with contextlib.suppress(OSError):  # the connection has just been closed
                connection.shutdown(socket.SHUT_RDWR)


class _Body(io.RawIOBase):
    """A request body, which the client may delay with ``Expect: 100-continue``."""

    def __init__(self, connection: "_Connection", length: int) -> None:
        self._connection = connection
        self._left = length
        self._is_held_back = connection.headers.get("expect", "").lower() == "100-continue"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._left]
        if self._is_held_back and len(view):
            self._is_held_back = False
            self._connection.ask_for_body()
        size: int = self._connection.rfile.readinto(view)
        if size < len(view):
            raise ConnectionAbortedError("the client disconnected before the end of its request")
        self._left -= size
        return size

    @property
    def can_be_skipped(self) -> bool:
        return not self._left or (self._left <= MAX_UNREAD and not self._is_held_back)

    def skip(self) -> None:
        while self.read(PIECE):
            pass


class _Connection(MotoRequestHandler):
    """A connection with keep-alive; werkzeug's own handler closes it after the first request."""

    protocol_version = "HTTP/1.1"
    timeout = SILENCE_SECONDS
    disable_nagle_algorithm = True
    wbufsize = 2**16

    def handle_expect_100(self) -> bool:
        return True  # sent later, when the body is read

    def ask_for_body(self) -> None:
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()

    def log(self, type: str, message: str, *args: Any) -> None:
        """Log nothing: neither requests nor errors of clients."""

    def run_wsgi(self) -> None:
        lengths = self.headers.get_all("content-length", [])
        is_chunked = "transfer-encoding" in self.headers
        if len(lengths) + is_chunked > 1 or not all(
            re.fullmatch("[0-9]{1,15}", n) for n in lengths
        ):
            self.send_error(400, "The length of the request is ambiguous or malformed")
            return
        environ = self.make_environ()
        environ["wsgi.file_wrapper"] = FileWrapper
        body = _Body(self, int(lengths[0]) if lengths else 0)
        if not is_chunked:
            environ["wsgi.input"] = body
        elif "expect" in self.headers:
            self.ask_for_body()
        started: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> Any:
            started.append((status, headers))

        content = self.server.app(environ, start_response)
        # Without the rest of the body, the start of the next request cannot be found.
        self.close_connection |= is_chunked or not body.can_be_skipped
        try:
            self._send(*started[-1], content)
        finally:
            if isinstance(content, FileWrapper | ClosingIterator):
                content.close()
        if not self.close_connection:
            body.skip()

    def _send(self, status: str, headers: list[tuple[str, str]], content: Iterable[bytes]) -> None:
        self.send_response_only(int(status[:3]), status[4:])
        self.send_header("Date", self.date_time_string())
        for name, value in headers:
            self.send_header(name, value.encode("latin-1", "replace").decode("latin-1"))
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        if not lengths and int(status[:3]) not in {204, 304}:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if not isinstance(content, FileWrapper):
            self.wfile.writelines(content)
        elif length := int(lengths[0]):
            self.wfile.flush()
            self.connection.sendfile(content.file, content.file.tell(), length)
