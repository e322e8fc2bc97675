"""Queries that run a function on a worker.

Only nested functions and lambdas are pickled by value; a worker cannot import tests.
"""

from collections.abc import Callable
from typing import Any

import polars as pl


def asking(answer: Callable[[], object]) -> pl.LazyFrame:
    """Return a query whose only value is the result of a function on a worker, as text."""

    def find(_: pl.DataFrame) -> pl.DataFrame:
        return pl.DataFrame({"answer": [str(answer())]})

    return pl.LazyFrame({"answer": [""]}).map_batches(find)


def ask_worker(context: Any, answer: Callable[[], object]) -> str:
    """Run a function on a worker, and return its result as text."""
    return str(asking(answer).remote(context).execute().head["answer"].item())
