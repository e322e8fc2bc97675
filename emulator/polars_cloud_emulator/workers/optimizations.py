"""Optimization flags of a query, and its optimized plan."""

from pathlib import Path

import polars as pl

from polars_cloud_emulator.model.jobs import Engine, PlanFormat

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
"""Bit of each option of ``polars.QueryOptFlags`` in the client's bit mask."""


def optimizations(mask: int | None) -> pl.QueryOptFlags:
    """Return the flags of a bit mask; Polars' defaults if it is None."""
    if mask is None:
        return pl.QueryOptFlags()
    return pl.QueryOptFlags(**{name: bool(mask >> bit & 1) for name, bit in BITS.items()})


def optimized(
    plan: Path, plan_format: PlanFormat, engine: Engine, optimization_flags: int | None
) -> str:
    """Return the optimized form of a serialized plan, as text or as a DOT graph."""
    lf = pl.LazyFrame.deserialize(plan)
    flags = optimizations(optimization_flags)
    if plan_format == "plain":
        return lf.explain(engine=engine, optimizations=flags)
    graph = lf.show_graph(raw_output=True, engine=engine, plan_stage="ir", optimizations=flags)
    assert graph is not None
    return graph
