"""The state on disk, committed before each response, so that no response is lost in a crash."""

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polars_cloud_emulator.model.clusters import Cluster
from polars_cloud_emulator.model.errors import CannotPersist
from polars_cloud_emulator.model.manifests import Manifest
from polars_cloud_emulator.model.queries import Query
from polars_cloud_emulator.model.state import Snapshot, State
from polars_cloud_emulator.protocol.grpc_transport import refusal_for
from polars_cloud_emulator.protocol.journal import is_for_people
from polars_cloud_emulator.storage.persisted_plans import PersistedPlans
from polars_cloud_emulator.storage.state_directory import UnusableStateDirectory

DAMAGED = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""SQLite error codes of a damaged or foreign file."""


class PersistedState:
    """An SQLite file with a row for each manifest, cluster and query.

    A commit survives a crash of this process, SIGKILL included, but not a crash of the machine.

    Parameters
    ----------
    plans
        Plans of the queries. A plan is deleted once the end of its query is committed.

    Raises
    ------
    UnusableStateDirectory
        The file cannot be opened, is damaged, or was written by another version.
    """

    def __init__(self, path: Path, plans: PersistedPlans) -> None:
        self._path = path
        self._plans = plans
        self._committed: dict[str, dict[Any, tuple[Any, ...]]] = {
            "manifest": {},
            "cluster": {},
            "query": {},
        }
        with self._opening():
            # Opened in the thread that starts the emulator, used in the server's thread.
            self._file = sqlite3.connect(path, timeout=0, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = OFF")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS kept "
                "(kind TEXT, key TEXT, content BLOB, PRIMARY KEY (kind, key))"
            )

    def load(self) -> Snapshot:
        """Return the committed state, in order of creation."""
        snapshot = Snapshot({}, {}, {})
        with self._opening():
            [[problem]] = self._file.execute("PRAGMA integrity_check(1)")
            if problem != "ok":
                raise sqlite3.DatabaseError(problem)
            for kind, content in self._file.execute(
                "SELECT kind, content FROM kept ORDER BY rowid"
            ):
                if kind == "manifest":
                    manifest = msgspec.msgpack.decode(content, type=Manifest)
                    snapshot.manifests[manifest.name] = manifest
                elif kind == "cluster":
                    cluster = msgspec.msgpack.decode(content, type=Cluster)
                    snapshot.clusters[cluster.id] = cluster
                else:
                    query = msgspec.msgpack.decode(content, type=Query)
                    snapshot.queries[query.id] = query
            lost = {q.cluster_id for q in snapshot.queries.values()} - snapshot.clusters.keys()
            if lost:
                raise sqlite3.DatabaseError(f"cluster {lost.pop()} is missing")
        return snapshot

    def commit(self, state: State) -> None:
        """Write all changes since the last commit.

        Raises
        ------
        CannotPersist
            The changes cannot be written, for example on a full disk.
        """
        everything: dict[str, Mapping[Any, msgspec.Struct]] = {
            "manifest": state.manifests.by_name,
            "cluster": state.clusters.by_id,
            "query": state.queries.by_id,
        }
        # Committed queries that have ended are left out: each call would compare thousands.
        comparable = everything | {"query": state.queries.uncommitted}
        changed = [
            (kind, key, each, fields)
            for kind, objects in comparable.items()
            for key, each in objects.items()
            if self._committed[kind].get(key) != (fields := _mutable_fields(each))
        ]
        new = Counter(kind for kind, key, *_ in changed if key not in self._committed[kind])
        gone = [
            (kind, key)
            for kind, objects in everything.items()
            # New objects are counted: if the number is equal, no object was removed.
            if len(self._committed[kind]) + new[kind] != len(objects)
            for key in self._committed[kind].keys() - objects.keys()
        ]
        if changed or gone:
            with self._writing():
                self._file.executemany(
                    "DELETE FROM kept WHERE kind = ? AND key = ?",
                    ((kind, str(key)) for kind, key in gone),
                )
                self._file.executemany(
                    "INSERT INTO kept VALUES (?, ?, ?) "
                    "ON CONFLICT (kind, key) DO UPDATE SET content = excluded.content",
                    (
                        (kind, str(key), msgspec.msgpack.encode(each))
                        for kind, key, each, _ in changed
                    ),
                )
            for kind, key in gone:
                del self._committed[kind][key]
            for kind, key, _, fields in changed:
                self._committed[kind][key] = fields
        # Only after the commit: a query that has not ended on disk runs again after a restart.
        for query_id in state.queries.mark_committed():
            self._plans.discard(query_id)

    def close(self) -> None:
        self._file.close()

    @contextlib.contextmanager
    def transaction(self, state: State) -> Iterator[None]:
        """Commit the changes of the block, or roll the state back if the block or the commit fails.

        The block must not await, and must not have side effects outside the state.

        Raises
        ------
        CannotPersist
            The changes cannot be written, for example on a full disk.
        """
        roll_back = state.rollback_to_now()
        try:
            yield
            self.commit(state)
        except BaseException:
            roll_back()
            raise
        _has_committed.set(True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._file:
                yield
        except sqlite3.Error as error:
            raise CannotPersist(error) from None

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, msgspec.DecodeError, TypeError) as error:
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) in DAMAGED:
                problem = (
                    f"is damaged or was written by another version ({error}); delete it to start "
                    "with an empty state"
                )
            else:
                problem = f"cannot be used: {error}"
            raise UnusableStateDirectory(f"{self._path} {problem}") from None


def _mutable_fields(each: msgspec.Struct) -> tuple[Any, ...]:
    """Return the fields that can change. Ended queries and clusters have few, which saves time."""
    if isinstance(each, Query) and each.has_ended:
        return (each.ended_at, each.cancels)
    if isinstance(each, Cluster) and each.stopped_at:
        return (each.stopped_at, each.manifest)
    return msgspec.structs.astuple(each)


class CommitMiddleware:
    """Commits the state before each response to a client, and answers with an error if that fails.

    Changes of the call itself are committed already, by ``transaction``. This middleware commits
    changes that no call made, such as the end of a query.
    """

    def __init__(self, app: ASGIApp, persisted: PersistedState, state: State) -> None:
        self._app = app
        self._persisted = persisted
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def commit_first(message: Message) -> None:
            if message["type"] == "http.response.start":
                try:
                    self._persisted.commit(self._state)
                except CannotPersist:
                    if not _has_committed.get():
                        raise
            await send(message)

        if scope["type"] != "http" or not _reports_state(scope["path"]):
            await self._app(scope, receive, send)
            return
        _has_committed.set(False)
        try:
            await self._app(scope, receive, commit_first)
        except CannotPersist as error:
            await refusal_for(Request(scope), error)(scope, receive, send)


_has_committed: ContextVar[bool] = ContextVar("has_committed", default=False)
"""True if the current call has committed a change: then its response is sent in any case."""


def _reports_state(path: str) -> bool:
    """Return whether a path belongs to a client's call other than a login."""
    return not (is_for_people(path) or path.startswith("/realms/"))
