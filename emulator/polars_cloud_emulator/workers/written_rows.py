"""Number and head of the rows that a query writes, recorded before they reach the sink.

The sink's files are not read back, because a CSV file, for example, does not contain its schema.
"""

import functools
import sys

import polars as pl

NAME = "_written_rows"
"""Name under which a plan imports this module, because a worker hides the emulator's package."""

ROW_INDEX = "__polars_cloud_emulator_row"
HEAD_ROWS = 10

_heights: list[int] = []
_firsts: list[pl.DataFrame] = []


@functools.cache
def counting_steps() -> bytes:
    """Return a plan whose steps record the rows that pass through them, without changing them."""
    numbered = pl.LazyFrame().with_row_index(ROW_INDEX)
    return numbered.map_batches(_note, streamable=True).drop(ROW_INDEX).serialize()


def reset() -> None:
    """Reset count and head for the next query."""
    _heights.clear()
    _firsts.clear()


def count() -> int:
    return sum(_heights)


def head() -> pl.DataFrame | None:
    """Return the first rows; None if there was no batch, not even an empty one."""
    if not _firsts:
        return None
    # Batches may arrive in any order.
    return pl.concat(_firsts).sort(ROW_INDEX).drop(ROW_INDEX)


def _note(batch: pl.DataFrame) -> pl.DataFrame:
    _heights.append(batch.height)
    first = batch.filter(pl.col(ROW_INDEX) < HEAD_ROWS)
    if first.height or not _firsts:
        _firsts.append(first)
    return batch


sys.modules[NAME] = sys.modules[__name__]
_note.__module__ = NAME
