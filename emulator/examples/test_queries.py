"""Tests of remote queries, with the emulator's fixtures."""

from datetime import timedelta
from typing import Any

import polars as pl
import pytest

from polars_cloud_emulator.testing import RunningEmulator


def start_cluster() -> Any:
    import polars_cloud as pc  # reads its addresses on import

    context = pc.ComputeContext(workspace="playground", cpus=2, memory=4, idle_timeout_mins=10)
    context.start()
    return context


def test_query_counts_the_sales(polars_cloud_emulator: RunningEmulator) -> None:
    sales = pl.scan_parquet("s3://your-bucket/sales/")
    rows = sales.remote(start_cluster()).execute().n_rows_total
    assert rows == sales.select(pl.len()).collect().item()


def test_query_whose_worker_dies_fails(polars_cloud_emulator: RunningEmulator) -> None:
    polars_cloud_emulator.add_fault("SubmitQuery", "worker_killed")
    with pytest.raises(RuntimeError, match="worker process died"):
        pl.LazyFrame({"x": [1]}).remote(start_cluster()).execute()


def test_cluster_stops_at_its_idle_timeout(polars_cloud_emulator: RunningEmulator) -> None:
    start_cluster()
    polars_cloud_emulator.advance_clock(timedelta(minutes=10))
    [cluster] = polars_cloud_emulator.state()["clusters"]
    assert cluster["billed_seconds"] >= 600
