"""The first rows of a result, as a page shows them."""

import io
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import pytest

from polars_cloud_emulator.planes.first_rows import (
    COLUMNS,
    LONGEST_TEXT,
    FirstRows,
    read_first_rows,
)

CUT = LONGEST_TEXT + len("…")


def shown(frame: pl.DataFrame) -> FirstRows:
    file = io.BytesIO()
    frame.write_ipc(file)
    first_rows = read_first_rows(file.getvalue())
    assert first_rows is not None
    return first_rows


@pytest.mark.parametrize(
    ("values", "dtype", "texts"),
    [
        ([1, None], pl.Int64, ["1", None]),
        ([2**100], pl.Int128, [str(2**100)]),
        ([1.5, float("nan")], pl.Float64, ["1.5", "nan"]),
        ([Decimal("1.50")], pl.Decimal(10, 2), ["1.50"]),
        ([True, None], pl.Boolean, ["True", None]),
        ([None], pl.Null, [None]),
        (["a", "", None], pl.String, ["a", "", None]),
        (["a"], pl.Categorical, ["a"]),
        (["a"], pl.Enum(["a"]), ["a"]),
        ([b"\xff"], pl.Binary, [r"b'\xff'"]),
        ([date(2026, 11, 29)], pl.Date, ["2026-11-29"]),
        ([3_000_000], pl.Date, ["+10183-09-21"]),
        ([datetime(2026, 1, 2, 3)], pl.Datetime("ms"), ["2026-01-02 03:00:00.000"]),
        (
            [datetime(2026, 1, 2, 3, tzinfo=UTC)],
            pl.Datetime("us", "UTC"),
            ["2026-01-02 03:00:00.000000+00:00"],
        ),
        ([timedelta(seconds=90)], pl.Duration, ["0:01:30"]),
        ([[1, None], [], None], pl.List(pl.Int64), ["[1, None]", "[]", None]),
        ([[[1, 2], [3, 4]]], pl.Array(pl.Int8, (2, 2)), ["[[1, 2], [3, 4]]"]),
        (
            [{"a": "x", "b": [date(2026, 1, 2)]}, None],
            pl.Struct({"a": pl.String, "b": pl.List(pl.Date)}),
            ["{'a': 'x', 'b': ['2026-01-02']}", None],
        ),
    ],
    ids=str,
)
def test_values_of_each_type_are_shown(
    values: Sequence[Any], dtype: pl.DataType, texts: list[str | None]
) -> None:
    if values == [3_000_000]:  # a day that Python has no date for
        frame = pl.DataFrame({"x": pl.Series(values, dtype=pl.Int32).cast(dtype)})
    else:
        frame = pl.DataFrame({"x": pl.Series(values, dtype=dtype)})
    assert [text for [text] in shown(frame).rows] == texts


@pytest.mark.parametrize(
    "value",
    [
        "a" * 10_000_000,
        b"a" * 10_000_000,
        [1] * 1_000_000,
        ["a" * 1_000] * 10_000,
        {"a": ["a" * 1_000] * 10_000},
        [[{"a": "a" * 1_000}] * 1_000] * 10,
    ],
    ids=["text", "bytes", "list", "list of texts", "struct", "lists of structs"],
)
def test_long_value_is_cut(value: Any) -> None:
    [[text]] = shown(pl.DataFrame({"x": [value]})).rows
    assert text is not None
    assert len(text) == CUT
    assert text.endswith("…")


@pytest.mark.parametrize("name", ["*", "^x$", "^.*$", ""])
def test_name_of_a_column_is_no_pattern(name: str) -> None:
    first_rows = shown(pl.DataFrame({name: [1], "x": [2]}))
    assert [column.name for column in first_rows.columns] == [name, "x"]
    assert first_rows.rows == [["1", "2"]]
    assert first_rows.more_columns == 0


def test_further_columns_are_counted() -> None:
    first_rows = shown(pl.DataFrame({f"column {n}": [n] for n in range(COLUMNS + 3)}))
    assert [column.name for column in first_rows.columns] == [f"column {n}" for n in range(COLUMNS)]
    assert first_rows.rows == [[str(n) for n in range(COLUMNS)]]
    assert first_rows.more_columns == 3


def test_long_name_is_cut_and_numbers_are_known() -> None:
    columns = shown(pl.DataFrame({"x" * 1_000: [1], "y": ["1"]})).columns
    assert [len(column.name) for column in columns] == [CUT, 1]
    assert [column.is_number for column in columns] == [True, False]


def test_rows_that_cannot_be_read_are_not_shown() -> None:
    assert read_first_rows(b"no Arrow IPC file") is None
