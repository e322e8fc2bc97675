"""The plans of the queries, a file each: a large frame is never in memory as a whole."""

from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

from polars_cloud_emulator.model.errors import CannotKeep

MAX_KEPT_PLAN = 50_000
"""Bytes of an ended query's plan."""


class KeptPlans:
    """A folder of serialized plans.

    Parameters
    ----------
    folder
        Of these files alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, query_id: UUID) -> Path:
        """The plan's file, whether or not it is there."""
        return self._folder / str(query_id)

    def keep(self, query_id: UUID, plan: bytes) -> None:
        """Keep the plan of a query that is about to be submitted.

        Raises
        ------
        CannotKeep
            As on a full disk.
        """
        try:
            self.path(query_id).write_bytes(plan)
        except OSError as error:
            self.delete(query_id)
            raise CannotKeep(error) from None

    def delete(self, query_id: UUID) -> None:
        self.path(query_id).unlink(missing_ok=True)

    def delete_large(self, query_id: UUID) -> None:
        """Delete the plan of a query that has ended, unless it is small enough to be looked at."""
        path = self.path(query_id)
        if path.exists() and path.stat().st_size > MAX_KEPT_PLAN:
            path.unlink()

    def delete_all_but(self, query_ids: Iterable[UUID]) -> None:
        """Delete every other file: of what a worker writes here, too, if it was killed."""
        kept = {*map(str, query_ids)}
        for path in self._folder.iterdir():
            if path.name not in kept:
                path.unlink()
