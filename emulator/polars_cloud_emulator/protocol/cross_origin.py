"""Middleware that refuses cross-origin requests of web pages.

Any web page can make a browser on this machine send requests to the emulator. The page cannot forge
their ``Host`` and ``Origin`` headers, and it cannot send every content type.
"""

import re

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polars_cloud_emulator.model.errors import (
    EmulatorError,
    InvalidRequest,
    PermissionDenied,
    UnsupportedType,
)
from polars_cloud_emulator.model.workspace import CLUSTER_DOMAIN
from polars_cloud_emulator.protocol import grpc_transport
from polars_cloud_emulator.protocol.access_tokens import DEVICE_PATH, TOKEN_PATH
from polars_cloud_emulator.protocol.journal import LOGIN_PREFIX
from polars_cloud_emulator.protocol.own_hosts import is_own_host

CLUSTER_HOST = re.compile(rf"[0-9a-f-]{{36}}\.{re.escape(CLUSTER_DOMAIN)}(:[0-9]{{1,5}})?")
GRPC_PATH = re.compile(r"/[\w.]+\.\w+/\w+")
READING = {"GET", "HEAD", "OPTIONS"}
"""Methods without side effects."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Headers of each response but gRPC's: no page of another origin can embed or read it."""


class CrossOriginMiddleware:
    """Passes on requests of programs and of the emulator's own pages, and refuses all others.

    Parameters
    ----------
    host
        Name or address that clients use for the emulator.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        app = self._app
        if scope["type"] == "http":
            request = Request(scope)
            try:
                self._check_host(request)
                _check_page(request)
                _check_content_type(request)
            except EmulatorError as error:
                app = grpc_transport.refusal_for(request, error)
        await app(scope, receive, _with_headers(send))

    def _check_host(self, request: Request) -> None:
        if not request.scope["path"].startswith("/"):
            raise InvalidRequest("the request target must be a path, which begins with /")
        hosts = request.headers.getlist("host")
        own = (self._host, request.scope["server"][0])
        if len(hosts) != 1 or not (is_own_host(hosts[0], own) or CLUSTER_HOST.fullmatch(hosts[0])):
            raise PermissionDenied(
                f"the host '{', '.join(hosts)}' is not this emulator: use {self._host} or "
                "localhost, or start the emulator with --host and the name that you need"
            )


def _check_page(request: Request) -> None:
    """Refuse a request of a page of another origin, unless the user followed a link."""
    own = f"{request.scope['scheme']}://{request.headers['host']}".lower()
    for origin in request.headers.getlist("origin"):
        if origin.lower() != own:
            raise PermissionDenied(
                f"a page of '{origin}' may not send requests to the emulator: use a program or a "
                f"page of {own}"
            )
    site, mode, destination = (
        request.headers.get(f"sec-fetch-{name}") for name in ("site", "mode", "dest")
    )
    is_link = (request.method, mode, destination) == ("GET", "navigate", "document")
    if site not in {None, "none", "same-origin"} and not is_link:
        raise PermissionDenied(
            "a page of another origin may only link to the emulator, not send requests to it"
        )


def _check_content_type(request: Request) -> None:
    """Refuse a request with side effects unless it has the content type of its route.

    A page of another origin cannot send these content types without a CORS preflight request.
    """
    if request.method in READING:
        return
    path, headers = request.scope["path"], request.headers
    expected = "application/json"
    if path in {TOKEN_PATH, DEVICE_PATH} or path.startswith(LOGIN_PREFIX):
        expected = "application/x-www-form-urlencoded"
    elif GRPC_PATH.fullmatch(path):
        expected = grpc_transport.CONTENT_TYPE
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    # The client leaves the content type out of requests without a body.
    is_empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    has_token = headers.get("authorization", "").startswith("Bearer ")
    if given != expected and not (not given and is_empty and has_token):
        raise UnsupportedType(f"the content type must be {expected}, not {given or 'none'}")
    if given == grpc_transport.CONTENT_TYPE and request.scope["http_version"] != "2":
        raise InvalidRequest("gRPC needs HTTP/2")


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            if headers.get("content-type") != grpc_transport.CONTENT_TYPE:
                headers.update(HEADERS)
            message["headers"] = headers.raw
        await send(message)

    return send_with_headers
