"""The first rows of a result as text, a few columns and characters of them."""

import io
from typing import NamedTuple

import polars as pl

COLUMNS = 20
LONGEST_TEXT = 80
"""Characters of a cell, or of a column's name."""


class Column(NamedTuple):
    name: str
    dtype: str
    is_number: bool


class FirstRows(NamedTuple):
    columns: list[Column]
    rows: list[list[str | None]]
    more_columns: int
    """Columns that are left out."""


def read_first_rows(head: bytes) -> FirstRows | None:
    """Return the rows of an Arrow IPC file; None if Python has no values for them."""
    try:
        count = len(pl.read_ipc_schema(io.BytesIO(head)))
        # By number: Polars takes a name such as ^.*$ for a pattern.
        frame = pl.read_ipc(io.BytesIO(head), columns=list(range(min(count, COLUMNS))))
        schema = frame.schema
        frame.columns = [str(number) for number in range(len(schema))]
        short = frame.select(_shortened(pl.col(n), dtype) for n, dtype in frame.schema.items())
        rows = [[None if cell is None else _cut(str(cell)) for cell in row] for row in short.rows()]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, OverflowError):
        return None
    columns = [
        Column(_cut(name), _cut(str(dtype)), dtype.is_numeric()) for name, dtype in schema.items()
    ]
    return FirstRows(columns, rows, count - len(columns))


def _shortened(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Return no more of each value than makes its text longer than is shown."""
    match dtype:
        case pl.String() | pl.Categorical() | pl.Enum() | pl.Date() | pl.Datetime():
            return column.cast(pl.String).str.head(LONGEST_TEXT + 1)
        case pl.Binary():
            return column.bin.head(LONGEST_TEXT)
        case pl.List(inner=pl.DataType() as inner):
            return column.list.head(LONGEST_TEXT).list.eval(_shortened(pl.element(), inner))
        case pl.Array(inner=pl.DataType() as inner):
            return _shortened(column.arr.to_list(), pl.List(inner))
        case pl.Struct(fields=fields):
            return column.struct.with_fields(
                _shortened(pl.field(field.name), field.dtype).alias(field.name)
                for field in fields
                if isinstance(field.dtype, pl.DataType)
            )
    return column


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
