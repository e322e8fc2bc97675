"""Functions that run on a worker. Nested ones and lambdas go there; a worker imports no test."""

from collections.abc import Callable
from typing import Any

import polars as pl


def asking(answer: Callable[[], object]) -> pl.LazyFrame:
    """A query whose one value is what a function finds on a worker, as text."""

    def find(_: pl.DataFrame) -> pl.DataFrame:
        return pl.DataFrame({"answer": [str(answer())]})

    return pl.LazyFrame({"answer": [""]}).map_batches(find)


def ask_worker(context: Any, answer: Callable[[], object]) -> str:
    """What a user's function finds on a worker, as text."""
    return str(asking(answer).remote(context).execute().head["answer"].item())
