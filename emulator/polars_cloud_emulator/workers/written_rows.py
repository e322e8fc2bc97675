"""The rows on their way into a sink: how many, and the first of them.

Nothing that a sink wrote is read back: a CSV file does not say how it is to be read.
"""

import functools
import sys

import polars as pl

NAME = "_written_rows"
"""Where a plan finds this module, on a worker where nothing finds the emulator's package."""

ROW_INDEX = "__polars_cloud_emulator_row"
HEAD_ROWS = 10

_heights: list[int] = []
_firsts: list[pl.DataFrame] = []


@functools.cache
def counting_steps() -> bytes:
    """A plan without data whose steps, put below a sink, note what passes and change nothing."""
    numbered = pl.LazyFrame().with_row_index(ROW_INDEX)
    return numbered.map_batches(_note, streamable=True).drop(ROW_INDEX).serialize()


def reset() -> None:
    """Begin with the next query."""
    _heights.clear()
    _firsts.clear()


def count() -> int:
    return sum(_heights)


def head() -> pl.DataFrame | None:
    """The first rows; None if no batch passed, not even an empty one."""
    if not _firsts:
        return None
    # Batches pass in any order.
    return pl.concat(_firsts).sort(ROW_INDEX).drop(ROW_INDEX)


def _note(batch: pl.DataFrame) -> pl.DataFrame:
    _heights.append(batch.height)
    first = batch.filter(pl.col(ROW_INDEX) < HEAD_ROWS)
    if first.height or not _firsts:
        _firsts.append(first)
    return batch


sys.modules[NAME] = sys.modules[__name__]
_note.__module__ = NAME
