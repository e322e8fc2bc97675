"""What was called: the journal of every call, and the calls nobody here understands."""

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
"""Characters of a path or a client's name."""
ADMIN_PREFIX = "/_emulator/"
PORTAL_PREFIX = "/portal/"
"""Of the pages of clusters and queries; the first page is at the root."""
LOGIN_PREFIX = f"{PORTAL_PREFIX}login/"
"""Of the page on which a person confirms a login."""


class Entry(msgspec.Struct):
    """One call. Query strings, headers and bodies are left out: they may hold secrets.

    ``account`` is the client id behind the access token, None if none was good when the call came.
    ``status`` is None as long as there is no answer, and for ever if it was lost.
    """

    at: datetime
    method: str
    path: str
    client: str
    account: str | None = None
    status: int | None = None
    grpc_status: int | None = None


class Journal:
    """The latest calls, and those among them that the emulator does not know."""

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
        # Anybody on this machine may write here, without a login.
        path, client = scope["path"][:MAX_TEXT], client[:MAX_TEXT]
        self.entries.append(Entry(self._clock.now(), scope["method"], path, client))
        return self.entries[-1]


class JournalMiddleware:
    """Writes down every call of a client: not those of the admin API, and no page."""

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
    """Return whether a path is a page's or the admin API's."""
    return path == "/" or path.startswith((ADMIN_PREFIX, PORTAL_PREFIX))
