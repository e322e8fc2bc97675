"""A query that runs until the test releases it, so that no test depends on how long it takes."""

import time
from pathlib import Path

import polars as pl

from polars_cloud_emulator.testing import eventually


class BlockingQuery:
    """A query that blocks in a user's function, controlled through two files.

    Parameters
    ----------
    directory
        Directory for the files, one per blocking query.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self._started = directory / "started"
        self._released = directory / "released"

    def lazy_frame(self) -> pl.LazyFrame:
        started, released = self._started, self._released

        def block(df: pl.DataFrame) -> pl.DataFrame:
            started.touch()
            while not released.exists():
                time.sleep(0.01)
            return df

        return pl.LazyFrame({"x": [1, 2, 3]}).map_batches(block)

    @property
    def has_started(self) -> bool:
        return self._started.exists()

    def wait_for_start(self) -> None:
        eventually(self._started.exists)

    def release(self) -> None:
        self._released.touch()
