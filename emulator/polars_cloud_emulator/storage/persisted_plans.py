"""The plans of the queries, in files: a large frame is never in memory as a whole."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

from polars_cloud_emulator.model.errors import CannotPersist

REDACTED = ".shown"
"""End of the name of a plan without secrets."""


class PersistedPlans:
    """A folder of serialized plans.

    A query's plan is there until the query has ended, as it may hold secrets. For its page there
    is another file, without them.

    Parameters
    ----------
    folder
        Of these files alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, query_id: UUID) -> Path:
        """The plan's file until its query has ended."""
        return self._folder / str(query_id)

    def best_path(self, query_id: UUID) -> Path | None:
        """The file that tells most of a plan; None if there is none any more."""
        paths = (self.path(query_id), self._redacted_path(query_id))
        return next((path for path in paths if path.exists()), None)

    def store(self, query_id: UUID, plan: bytes, *, redacted: bytes | None) -> None:
        """Keep the plan of a query that is about to be submitted.

        Parameters
        ----------
        redacted
            The plan without secrets, if it is to be shown when its query has ended.

        Raises
        ------
        CannotPersist
            As on a full disk.
        """
        try:
            self.path(query_id).write_bytes(plan)
            if redacted is not None:
                self._redacted_path(query_id).write_bytes(redacted)
        except OSError as error:
            self.delete(query_id)
            raise CannotPersist(error) from None

    def discard(self, query_id: UUID) -> None:
        """Delete the plan of a query that has ended, secrets and all."""
        with contextlib.suppress(OSError):  # of a disk that lets nothing be deleted: at a restart
            self.path(query_id).unlink(missing_ok=True)

    def delete(self, query_id: UUID) -> None:
        self.discard(query_id)
        with contextlib.suppress(OSError):
            self._redacted_path(query_id).unlink(missing_ok=True)

    def delete_all_but(self, active: Iterable[UUID], ended: Iterable[UUID]) -> None:
        """Delete every other file: of what a worker writes here, too, if it was killed."""
        running = [*active]
        kept = {self.path(query_id) for query_id in running}
        kept |= {self._redacted_path(query_id) for query_id in (*running, *ended)}
        for path in self._folder.iterdir():
            if path not in kept:
                path.unlink()

    def _redacted_path(self, query_id: UUID) -> Path:
        return self._folder / f"{query_id}{REDACTED}"
