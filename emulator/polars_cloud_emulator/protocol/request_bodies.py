"""Request bodies: each is read to its end, up to a maximum size."""

from contextlib import suppress

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polars_cloud_emulator.model.errors import TooLarge
from polars_cloud_emulator.protocol.connections import Connection

MAX_FORM = 10_000
"""Maximum bytes of a login form, which needs no credentials; the client sends 150."""
MAX_JSON = 10_000_000
"""Maximum bytes of a JSON body, more than the longest cluster specification needs."""
MAX_DROPPED = 1_000_000_000
"""Maximum bytes that are read and dropped before a response; then the connection is reset."""


class RequestBodyMiddleware:
    """Reads the rest of each request body before the response is sent.

    If the response comes first, hypercorn drops the connection, and with it all other requests on
    that connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        more = scope["type"] == "http"

        async def receive_part() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        async def send_after_body(message: Message) -> None:
            dropped = 0
            while more:
                part = await receive_part()
                if part["type"] == "http.disconnect":
                    raise ClientDisconnect
                before, dropped = dropped, dropped + len(part["body"])
                if before <= MAX_DROPPED < dropped:
                    Connection.current.get().reset()
            await send(message)

        # A client that disconnects during its request gets no response.
        with suppress(ClientDisconnect):
            await self._app(scope, receive_part, send_after_body)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the whole body.

    Raises
    ------
    TooLarge
        The body has more than ``max_bytes`` bytes.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise TooLarge(f"the body of {request.url.path} has more than {max_bytes:,} bytes")
    return bytes(body)
