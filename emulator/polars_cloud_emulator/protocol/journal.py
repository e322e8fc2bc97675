"""The journal: the latest calls of clients, with those that the emulator does not know."""

from collections import deque
from contextlib import suppress
from datetime import datetime

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.errors import Unauthenticated, UnknownCall
from polars_cloud_emulator.protocol.access_tokens import AccessTokens

MAX_ENTRIES = 2_000
MAX_TEXT = 1_000
"""Maximum characters of a recorded path or user agent."""
ADMIN_PREFIX = "/_emulator/"
PORTAL_PREFIX = "/portal/"
"""Path prefix of the pages of clusters and queries; the front page is at the root."""
LOGIN_PREFIX = f"{PORTAL_PREFIX}login/"
"""Path prefix of the page on which a person confirms a device login."""


class Entry(msgspec.Struct):
    """One call, without its query string, headers and body, which may contain secrets.

    ``account`` is the client id of the access token; None if the call had no valid token.
    ``status`` is None until the response is sent. It stays None if a fault dropped the response.
    """

    at: datetime
    method: str
    path: str
    client: str
    account: str | None = None
    status: int | None = None
    grpc_status: int | None = None


class Journal:
    """The latest ``MAX_ENTRIES`` calls."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.entries: deque[Entry] = deque(maxlen=MAX_ENTRIES)

    @property
    def unmatched(self) -> list[Entry]:
        return [
            entry
            for entry in self.entries
            if UnknownCall.http_status == entry.status
            or UnknownCall.grpc_status == entry.grpc_status
        ]

    def record(self, scope: Scope) -> Entry:
        client = Headers(scope=scope).get("user-agent", "")
        # Truncated, because calls without a login are recorded, too.
        path, client = scope["path"][:MAX_TEXT], client[:MAX_TEXT]
        self.entries.append(Entry(self._clock.now(), scope["method"], path, client))
        return self.entries[-1]


class JournalMiddleware:
    """Records every call of a client, but not those of the admin API and of the pages."""

    def __init__(self, app: ASGIApp, journal: Journal, access_tokens: AccessTokens) -> None:
        self._app = app
        self._journal = journal
        self._access_tokens = access_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_for_people(scope["path"]):
            send = self._recorded(scope, send)
        await self._app(scope, receive, send)

    def _recorded(self, scope: Scope, send: Send) -> Send:
        entry = self._journal.record(scope)
        with suppress(Unauthenticated):
            entry.account = self._access_tokens.check(Headers(scope=scope).get("authorization"))

        async def observe(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            elif message["type"] == "http.response.trailers":
                entry.grpc_status = int(dict(message["headers"])[b"grpc-status"])
            await send(message)

        return observe


def is_for_people(path: str) -> bool:
    """Return whether a path belongs to the pages or to the admin API."""
    return path == "/" or path.startswith((ADMIN_PREFIX, PORTAL_PREFIX))
