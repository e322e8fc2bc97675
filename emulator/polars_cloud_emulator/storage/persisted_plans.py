"""Serialized plans of queries in files, so that a large frame is never in memory as a whole."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

from polars_cloud_emulator.model.errors import CannotPersist

REDACTED = ".shown"
"""Suffix of the file of a plan without secrets."""


class PersistedPlans:
    """A folder of serialized plans.

    A plan may contain secrets, so its file is deleted when the query ends. A second file, without
    secrets, stays for the query's page.

    Parameters
    ----------
    folder
        Folder that contains nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, query_id: UUID) -> Path:
        """Return the path of a query's plan, which is deleted when the query ends."""
        return self._folder / str(query_id)

    def best_path(self, query_id: UUID) -> Path | None:
        """Return the complete plan's file if it exists, else the redacted one's, else None."""
        paths = (self.path(query_id), self._redacted_path(query_id))
        return next((path for path in paths if path.exists()), None)

    def store(self, query_id: UUID, plan: bytes, *, redacted: bytes | None) -> None:
        """Write the plan of a query before it is submitted.

        Parameters
        ----------
        redacted
            The plan without secrets, for the query's page; None to show no plan later.

        Raises
        ------
        CannotPersist
            A file cannot be written, for example on a full disk.
        """
        try:
            self.path(query_id).write_bytes(plan)
            if redacted is not None:
                self._redacted_path(query_id).write_bytes(redacted)
        except OSError as error:
            self.delete(query_id)
            raise CannotPersist(error) from None

    def discard(self, query_id: UUID) -> None:
        """Delete the complete plan of a query that has ended; the redacted plan stays."""
        with contextlib.suppress(OSError):  # on a read-only disk; the next start deletes it
            self.path(query_id).unlink(missing_ok=True)

    def delete(self, query_id: UUID) -> None:
        self.discard(query_id)
        with contextlib.suppress(OSError):
            self._redacted_path(query_id).unlink(missing_ok=True)

    def delete_all_but(self, active: Iterable[UUID], ended: Iterable[UUID]) -> None:
        """Delete all files of other queries, and temporary files of workers that were killed."""
        running = [*active]
        kept = {self.path(query_id) for query_id in running}
        kept |= {self._redacted_path(query_id) for query_id in (*running, *ended)}
        for path in self._folder.iterdir():
            if path not in kept:
                path.unlink()

    def _redacted_path(self, query_id: UUID) -> Path:
        return self._folder / f"{query_id}{REDACTED}"
