"""Files that a sink writes, and the number of rows that the query reports."""

import io
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

TARGET = "s3://your-bucket/sinks/"

StartCluster = Callable[..., Any]


@pytest.fixture
def context(start_cluster: StartCluster) -> Any:
    return start_cluster()


@pytest.mark.parametrize(
    ("frame", "options"),
    [
        pytest.param({"x": ["1"] * 200 + ["one"]}, {}, id="text after numbers"),
        pytest.param({"x": ["a,b", "c"], "y": [1, 2]}, {"separator": ";"}, id="semicolon"),
        pytest.param({"x": ["a,b,c", "d"], "y": [1, 2]}, {"separator": "\t"}, id="tab"),
        pytest.param(
            {"x": [1.5, 2.5]}, {"decimal_comma": True, "separator": ";"}, id="decimal comma"
        ),
        pytest.param({"x": [1, None, 3] * 60}, {"null_value": "none"}, id="null value"),
        pytest.param({"x": ["a,b", "c"]}, {"quote_char": "'"}, id="quote char"),
        pytest.param({"x": ["a,b", "c\nd"]}, {"quote_style": "never"}, id="never quoted"),
        pytest.param({"x": [1, 2, 3]}, {"line_terminator": "|"}, id="line terminator"),
        pytest.param({"x": [1, 2]}, {"include_header": False}, id="no header"),
        pytest.param({"x": []}, {"include_header": False}, id="no rows without header"),
    ],
)
@pytest.mark.parametrize("engine", ["streaming", "in-memory"])
def test_csv_sink_counts_its_rows_whatever_its_dialect(
    context: Any, frame: dict[str, list[Any]], options: dict[str, Any], engine: str
) -> None:
    data = pl.DataFrame(frame)
    expected = io.BytesIO()
    data.lazy().sink_csv(expected, **options)
    remote = data.lazy().remote(context, engine=engine).single_node()
    result = remote.sink_csv(f"{TARGET}x.csv", **options).await_result()
    assert result.n_rows_total == data.height
    assert_frame_equal(result.head, data.head(10))
    written = pl.scan_lines(f"{TARGET}x.csv", name="line").collect()["line"].to_list()
    assert written == expected.getvalue().decode().splitlines()


@pytest.mark.parametrize("sink", ["sink_parquet", "sink_ipc", "sink_csv"])
def test_sink_counts_more_rows_than_one_batch_and_shows_the_first(context: Any, sink: str) -> None:
    rows = pl.LazyFrame({"x": range(600_000)}).filter(pl.col("x") % 3 != 0)
    result = getattr(rows.remote(context), sink)(TARGET).await_result()
    assert result.n_rows_total == 400_000
    assert result.head["x"].to_list() == [1, 2, 4, 5, 7, 8, 10, 11, 13, 14]


@pytest.mark.parametrize("height", [0, 2])
def test_ndjson_sink_counts_its_rows(context: Any, height: int) -> None:
    frame = pl.DataFrame({"x": [1, 2]}).head(height).lazy()
    sinks = [frame.sink_ndjson(f"{TARGET}x.ndjson", lazy=True)]
    result = pl.collect_all(sinks, lazy=True).remote(context).execute()
    assert result.n_rows_total == height
    assert_frame_equal(result.head, frame.collect())


@pytest.mark.parametrize("sink", ["sink_parquet", "sink_ipc", "sink_csv"])
def test_partitioned_sink_without_rows_succeeds(context: Any, sink: str) -> None:
    frame = pl.LazyFrame({"region": ["North"], "quantity": [1]}).filter(pl.col("quantity") > 1)
    target = pl.PartitionBy(f"{TARGET}none/", key="region")
    result = getattr(frame.remote(context), sink)(target).await_result()
    assert (result.n_rows_total, result.location) == (0, [f"{TARGET}none/"])
    assert result.head.schema == frame.collect_schema()


def test_partitioned_sink_counts_its_own_rows_and_none_of_an_earlier_query(context: Any) -> None:
    target = pl.PartitionBy(f"{TARGET}by_region/", key="region")
    for region in ("North", "South"):
        frame = pl.LazyFrame({"region": [region], "quantity": [1]})
        assert frame.remote(context).sink_parquet(target).await_result().n_rows_total == 1
    assert pl.read_parquet(f"{TARGET}by_region/").height == 2


@pytest.mark.parametrize("height", [0, 25])
def test_callback_sink_counts_the_rows_that_reach_it(context: Any, height: int) -> None:
    frame = pl.LazyFrame({"x": range(height)}, schema={"x": pl.Int64})
    result = frame.remote(context).sink_batches(lambda batch: None).await_result()
    assert (result.n_rows_total, result.location) == (height, [])
    assert_frame_equal(result.head, frame.head(10).collect())


def test_sink_replaces_the_files_that_its_query_scans(context: Any) -> None:
    for uri in (TARGET, f"{TARGET}x.parquet"):
        pl.DataFrame({"x": [1, 2, 3]}).write_parquet(f"{TARGET}x.parquet")
        frame = pl.scan_parquet(f"{TARGET}x.parquet").select(pl.col("x") * 2)
        result = frame.remote(context).single_node().sink_parquet(uri).await_result()
        assert result.n_rows_total == 3
        assert pl.read_parquet(result.location)["x"].to_list() == [2, 4, 6]


def test_names_like_the_keys_of_a_plan_are_allowed(context: Any) -> None:
    frame = pl.DataFrame({"dsl_plans": ["dataframes"], "root": ["dsl_plans"]})
    query = frame.lazy().select("root", pl.col("dsl_plans") + "dsl_plans")
    assert_frame_equal(query.remote(context).execute().head, query.collect())
