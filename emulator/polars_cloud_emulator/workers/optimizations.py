"""Which optimizations of Polars a query asks for."""

import polars as pl

BITS = {
    "projection_pushdown": 0,
    "predicate_pushdown": 2,
    "cluster_with_columns": 3,
    "simplify_expression": 5,
    "slice_pushdown": 7,
    "comm_subplan_elim": 8,
    "comm_subexpr_elim": 9,
    "row_estimate": 13,
    "fast_projection": 14,
    "check_order_observe": 15,
    "sort_collapse": 16,
    "pre_partition_hive": 17,
    "join_order": 19,
}
"""Where the client's bit mask keeps each option of ``polars.QueryOptFlags``."""


def optimizations(mask: int | None) -> pl.QueryOptFlags:
    """Return the options of a bit mask; those of Polars if there is none."""
    if mask is None:
        return pl.QueryOptFlags()
    return pl.QueryOptFlags(**{name: bool(mask >> bit & 1) for name, bit in BITS.items()})
