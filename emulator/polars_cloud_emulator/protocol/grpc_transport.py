"""Unary gRPC calls as HTTP/2 requests of an ASGI server.

One call is one POST to ``/package.Service/Method``. Its body is a compression flag, a length and a
protobuf message. The response body has the same form, and the gRPC status is in the trailers
(https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md).
"""

import asyncio
import base64
import re
import struct
import tempfile
from collections.abc import Awaitable, Callable
from typing import IO, TypeVar
from urllib.parse import quote

from pure_protobuf.message import BaseMessage
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from polars_cloud_emulator.model.errors import (
    CannotPersist,
    EmulatorError,
    GrpcStatus,
    InvalidRequest,
)
from polars_cloud_emulator.protocol.rest_transport import refusal

CONTENT_TYPE = "application/grpc"
LARGE = 1_000_000
"""Bytes above which a message is spooled to disk and decoded in a thread."""
TIMEOUT_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

M = TypeVar("M", bound=BaseMessage)


def grpc_route(
    path: str,
    check: Callable[[Headers], None],
    request_type: type[M],
    method: Callable[[M, Request], Awaitable[BaseMessage]],
) -> Route:
    """Return a route that decodes the request, calls the method and encodes its result or error.

    ``check`` gets the headers before the body is read.
    """

    async def endpoint(request: Request) -> Response:
        try:
            check(request.headers)
            answer = await method(await _receive(request_type, request), request)
        except EmulatorError as error:
            return GrpcResponse(error=error)
        return GrpcResponse(bytes(answer))

    return Route(path, endpoint, methods=["POST"])


def seconds_left(request: Request) -> float | None:
    """Return the call's timeout in seconds (``grpc-timeout``); None if the client set none.

    Raises
    ------
    InvalidRequest
        The header is not up to eight digits and a unit.
    """
    timeout = request.headers.get("grpc-timeout")
    if timeout is None:
        return None
    match = re.fullmatch(r"([0-9]{1,8})([HMSmun])", timeout)
    if match is None:
        raise InvalidRequest(f"grpc-timeout must be up to 8 digits and a unit, not '{timeout}'")
    return int(match[1]) * TIMEOUT_UNITS[match[2]]


class GrpcResponse(Response):
    """A protobuf message, or an error as status, message and details.

    The client reads the details of ``InvalidRequest`` only.
    """

    def __init__(self, message: bytes | None = None, *, error: EmulatorError | None = None) -> None:
        super().__init__(media_type=CONTENT_TYPE)
        del self.headers["content-length"]
        self._frame = b"" if message is None else struct.pack(">BI", 0, len(message)) + message
        self._trailers = [
            (b"grpc-status", str(int(error.grpc_status if error else GrpcStatus.OK)).encode())
        ]
        if error is not None:
            self._trailers.append((b"grpc-message", quote(str(error)).encode()))
        if isinstance(error, InvalidRequest):
            details = base64.b64encode(f"ComputeError: {error}".encode()).rstrip(b"=")
            self._trailers.append((b"grpc-status-details-bin", details))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send({**start, "trailers": True})
        await send({"type": "http.response.body", "body": self._frame})
        await send({"type": "http.response.trailers", "headers": self._trailers})


def refusal_for(request: Request, error: EmulatorError) -> Response:
    """Return an error response in the protocol of the request: gRPC or REST."""
    is_grpc = request.headers.get("content-type", "").startswith(CONTENT_TYPE)
    if is_grpc and request.scope["http_version"] == "2":
        return GrpcResponse(error=error)
    return refusal(error)


async def _receive(request_type: type[M], request: Request) -> M:
    try:
        with tempfile.SpooledTemporaryFile(LARGE) as body:
            async for part in request.stream():
                body.write(part)
            if body.tell() <= LARGE:
                return _decode(request_type, body)
            return await asyncio.to_thread(_decode, request_type, body)
    except OSError as error:
        raise CannotPersist(error) from None


def _decode(request_type: type[M], body: IO[bytes]) -> M:
    size = body.tell()
    body.seek(0)
    flag, length = struct.unpack(">BI", body.read(5)) if size >= 5 else (1, 0)
    if flag or length != size - 5:
        raise InvalidRequest("the body must be one uncompressed gRPC message")
    try:
        return request_type.read_from(body)
    # The decoder raises its own exception only for a wrong type; malformed bytes raise these.
    except (ValueError, EOFError, OverflowError) as error:
        raise InvalidRequest(f"the body is not a {request_type.__name__}: {error}") from None
