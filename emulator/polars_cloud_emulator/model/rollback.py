"""Rollback of the state, for changes that cannot be written to disk."""

from collections import deque
from collections.abc import Callable
from copy import copy

import msgspec

from polars_cloud_emulator.model.queries import Query


def rollback_to_now(*holders: object) -> Callable[[], None]:
    """Return a function that restores the present tables of the holders, and their present rows."""
    tables = [
        (holder, name, copy(table))
        for holder in holders
        for name, table in vars(holder).items()
        if isinstance(table, dict | deque)
    ]
    values = [
        (each, msgspec.structs.astuple(each))
        for _, _, table in tables
        if isinstance(table, dict)
        for each in table.values()
        # There may be thousands of ended queries. They are replaced, never changed in place.
        if not (isinstance(each, Query) and each.has_ended)
    ]

    def roll_back() -> None:
        for holder, name, table in tables:
            setattr(holder, name, table)
        for each, fields in values:
            for name, value in zip(each.__struct_fields__, fields, strict=True):
                setattr(each, name, value)

    return roll_back
