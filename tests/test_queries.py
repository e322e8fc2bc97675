"""`include/queries.py`: a query's end becomes the task's end."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowTaskTimeout

from include.queries import wait_for
from polars_cloud_emulator.testing import RunningEmulator
from tests.emulator.blocking_query import BlockingQuery


@pytest.fixture
def ctx(pc: ModuleType) -> Any:
    ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    ctx.start()
    return ctx


@pytest.fixture
def blocking(tmp_path: Path) -> BlockingQuery:
    return BlockingQuery(tmp_path)


def test_a_successful_query_gives_its_location_and_the_log_tells_id_rows_and_destination(
    ctx: Any, caplog: pytest.LogCaptureFixture
) -> None:
    query = pl.LazyFrame({"x": [1, 2]}).remote(ctx).sink_parquet("s3://your-bucket/results/two/")
    with caplog.at_level(logging.INFO, "include.queries"):
        location = wait_for(query)
    assert pl.read_parquet(location).to_dict(as_series=False) == {"x": [1, 2]}
    for text in (str(query._query_id), "2 rows", location[0]):
        assert text in caplog.text


def test_a_failed_query_raises_its_own_exception(ctx: Any) -> None:
    query = pl.LazyFrame({"x": [1]}).select("y").remote(ctx).sink_parquet("s3://your-bucket/y/")
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="y"):
        wait_for(query)


def test_a_query_canceled_from_elsewhere_fails_the_task(ctx: Any, blocking: BlockingQuery) -> None:
    query = blocking.lazy_frame().remote(ctx).sink_parquet("s3://your-bucket/never/")
    with ThreadPoolExecutor() as background:
        waiting = background.submit(wait_for, query)
        blocking.wait_for_start()
        query.cancel()
        with pytest.raises(RuntimeError, match=r"ended as CANCELED"):
            waiting.result()


def test_a_result_without_a_location_fails_the_task(ctx: Any) -> None:
    query = pl.LazyFrame({"x": [1]}).remote(ctx).sink_batches(lambda batch: False)
    with pytest.raises(RuntimeError, match="names no location"):
        wait_for(query)


class Interrupted:
    """A query during whose wait Airflow's time-out strikes; everything else is the real query."""

    def __init__(self, query: Any) -> None:
        self._query = query
        self._query_id = query._query_id
        self.cancel = query.cancel

    def get_status(self) -> Any:
        raise AirflowTaskTimeout


def test_a_time_out_cancels_the_query(
    ctx: Any, blocking: BlockingQuery, emulator: RunningEmulator
) -> None:
    query = blocking.lazy_frame().remote(ctx).sink_parquet("s3://your-bucket/never/")
    blocking.wait_for_start()
    with pytest.raises(AirflowTaskTimeout):
        wait_for(Interrupted(query))  # type: ignore[arg-type]
    assert [query["status"] for query in emulator.state()["queries"]] == ["Canceled"]
