"""Input, output, results and errors of queries."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from polars_cloud_emulator.testing import RunningEmulator
from polars_cloud_emulator.workers.redacted_plan import LARGEST
from tests.buckets import create_bucket_elsewhere, create_bucket_of_others

SALES = "s3://your-bucket/sales/"

StartCluster = Callable[..., Any]


@pytest.fixture
def context(start_cluster: StartCluster) -> Any:
    return start_cluster()


def revenue_by_region() -> pl.LazyFrame:
    return (
        pl.scan_parquet(SALES)
        .filter(pl.col("status") == "completed")
        .group_by("region")
        .agg(pl.len(), revenue=(pl.col("quantity") * pl.col("unit_price")).sum())
        .sort("region")
    )


def one_row() -> pl.LazyFrame:
    return pl.LazyFrame({"x": [1]})


def test_sink_to_a_directory_writes_what_the_query_gives_locally(context: Any) -> None:
    target = "s3://your-bucket/revenue/"
    query = revenue_by_region().remote(context).sink_parquet(target)
    result = query.await_result()
    expected = revenue_by_region().collect()
    assert result.location == [f"{target}00000000.parquet"]
    assert result.n_rows_total == expected.height
    assert result.file_type == "parquet"
    assert_frame_equal(result.head, expected.head(10))
    assert_frame_equal(pl.read_parquet(target), expected)


@pytest.mark.parametrize(
    ("mode", "engine", "recorded"),
    [
        ("distributed", "auto", "streaming"),
        ("single_node", "streaming", "streaming"),
        ("single_node", "in-memory", "in-memory"),
    ],
)
def test_result_without_a_destination_is_readable_at_its_location(
    emulator: RunningEmulator, context: Any, mode: str, engine: str, recorded: str
) -> None:
    remote = getattr(revenue_by_region().remote(context, engine=engine), mode)()
    result = remote.execute()
    [location] = result.location
    expected = revenue_by_region().collect()
    assert_frame_equal(pl.read_parquet(location), expected)
    assert_frame_equal(result.lazy().collect(), expected)
    [query] = emulator.state()["queries"]
    assert (query["mode"], query["engine"]) == (mode, recorded)


def test_large_plan_ends_with_its_query_and_every_plan_with_a_reset(
    emulator: RunningEmulator, context: Any
) -> None:
    plans = Path(emulator.environment["POLARS_CLOUD_CONFIG_DIR"]).parent / "plans"
    for size in (1, LARGEST):
        pl.LazyFrame({"x": ["x" * size]}).remote(context).execute()
    small, large = (query["id"] for query in emulator.state()["queries"])
    assert [path.name for path in plans.iterdir()] == [f"{small}.shown"], f"and not {large}"
    emulator.reset()
    assert not [*plans.iterdir()]


def test_deleted_result_is_gone_and_a_file_with_a_destination_is_not(context: Any) -> None:
    temporary = one_row().remote(context).execute()
    kept = one_row().remote(context).sink_parquet("s3://your-bucket/x/").await_result()
    for result in (temporary, kept):
        assert pl.read_parquet(result.location).height == 1
        result.delete()
    with pytest.raises(FileNotFoundError):
        pl.read_parquet(temporary.location)
    assert pl.read_parquet(kept.location).height == 1


@pytest.mark.parametrize(
    ("sink", "target", "location", "read"),
    [
        ("sink_parquet", "x/", "x/00000000.parquet", pl.read_parquet),
        ("sink_parquet", "x", "x/00000000.parquet", pl.read_parquet),
        ("sink_parquet", "x/one.parquet", "x/one.parquet", pl.read_parquet),
        ("sink_csv", "x/", "x/00000000.csv", pl.read_csv),
        ("sink_ipc", "x/", "x/00000000.ipc", pl.read_ipc),
    ],
)
def test_each_sink_writes_the_file_that_it_reports(
    context: Any, sink: str, target: str, location: str, read: Callable[[str], pl.DataFrame]
) -> None:
    frame = pl.DataFrame({"product": ["tea", "jam", None], "quantity": [1, 2, 3]})
    remote = frame.lazy().remote(context).single_node()
    result = getattr(remote, sink)(f"s3://your-bucket/{target}").await_result()
    assert result.location == [f"s3://your-bucket/{location}"]
    assert result.file_type == sink.removeprefix("sink_")
    assert result.n_rows_total == 3
    assert_frame_equal(result.head, frame)
    assert_frame_equal(read(result.location[0]), frame)


@pytest.mark.parametrize("sink", ["sink_parquet", "sink_csv", "sink_ipc"])
def test_rows_are_those_of_the_latest_query_that_wrote_there(context: Any, sink: str) -> None:
    for rows in (5, 2, 3):
        remote = pl.LazyFrame({"x": range(rows)}).remote(context)
        result = getattr(remote, sink)("s3://your-bucket/x/").await_result()
        assert result.n_rows_total == result.head.height == rows


def test_csv_without_header_is_counted_right(context: Any) -> None:
    remote = pl.LazyFrame({"x": [1, 2]}).remote(context)
    result = remote.sink_csv("s3://your-bucket/x/", include_header=False).await_result()
    assert result.n_rows_total == 2


def test_partitioned_sink_writes_one_directory_per_key(context: Any) -> None:
    target = "s3://your-bucket/by_region/"
    frame = pl.DataFrame({"region": ["North", "South", "North"], "quantity": [1, 2, 3]})
    remote = frame.lazy().remote(context)
    result = remote.sink_parquet(pl.PartitionBy(target, key="region")).await_result()
    assert result.location == [target]
    assert result.n_rows_total == 3
    assert_frame_equal(pl.read_parquet(target).sort("quantity"), frame)
    assert pl.read_parquet(f"{target}region=North/").height == 2


def test_several_sinks_run_as_one_query(emulator: RunningEmulator, context: Any) -> None:
    frame = pl.LazyFrame({"x": [1, 2]})
    sinks = [
        frame.sink_ndjson("s3://your-bucket/both/x.ndjson", lazy=True),
        frame.select(pl.col("x") * 2).sink_parquet("s3://your-bucket/both/x.parquet", lazy=True),
    ]
    result = pl.collect_all(sinks, lazy=True).remote(context).execute()
    assert result.file_type == "ndjson"
    first, second = result.location
    assert pl.read_ndjson(first)["x"].to_list() == [1, 2]
    assert pl.read_parquet(second)["x"].to_list() == [2, 4]
    assert len(emulator.state()["queries"]) == 1


def test_empty_result_is_a_file_without_rows(context: Any) -> None:
    result = pl.LazyFrame({"x": [1]}).filter(pl.col("x") > 1).remote(context).execute()
    assert (result.n_rows_total, result.head.shape) == (0, (0, 1))
    assert pl.read_parquet(result.location[0]).schema == {"x": pl.Int64}


def test_sink_to_a_bucket_that_does_not_exist_fails_its_query(context: Any) -> None:
    query = one_row().remote(context).sink_parquet("s3://nobodys-bucket/x/")
    with pytest.raises(FileNotFoundError, match="The specified bucket does not exist"):
        query.await_result()


def test_secrets_of_a_sink_read_its_result_back(emulator: RunningEmulator, context: Any) -> None:
    frame = pl.LazyFrame({"x": [1, 2]})
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    options = {name.lower(): emulator.environment[name] for name in keys}
    remote = frame.remote(context)
    result = remote.sink_parquet("s3://your-bucket/x/", storage_options=options).await_result()
    assert result.n_rows_total == 2


FRAME = "s3://your-bucket/frame/"


def test_optimization_flags_reach_the_worker(context: Any, tmp_path: Path) -> None:
    columns = tmp_path / "columns"

    def write_columns(df: pl.DataFrame) -> pl.DataFrame:
        columns.write_text(" ".join(df.columns))
        return df

    pl.LazyFrame({"x": [1], "y": [2]}).remote(context).sink_parquet(FRAME).await_result()
    frame = pl.scan_parquet(FRAME).map_batches(
        write_columns, projection_pushdown=True, validate_output_schema=False
    )
    for flags, seen in [(pl.QueryOptFlags(), "x"), (pl.QueryOptFlags.none(), "x y")]:
        frame.select("x").remote(context).execute(optimizations=flags)
        assert columns.read_text() == seen


def test_user_function_that_prints_does_not_disturb_the_worker(context: Any) -> None:
    def talk(df: pl.DataFrame) -> pl.DataFrame:
        import os

        print("a line" * 10_000, flush=True)
        os.write(1, b"\x00\x00\x00\x01 bytes that look like an answer\n")
        return df

    for _ in range(2):
        result = pl.LazyFrame({"x": [1]}).map_batches(talk).remote(context).execute()
        assert result.n_rows_total == 1


def test_large_plan_and_result_pass(context: Any) -> None:
    frame = pl.LazyFrame({"x": range(1_000_000)})
    assert frame.remote(context).execute().n_rows_total == 1_000_000


@pytest.mark.parametrize(
    ("frame", "error", "match"),
    [
        (pl.scan_parquet(SALES).select("nope"), pl.exceptions.ColumnNotFoundError, '"nope"'),
        (
            pl.LazyFrame({"x": ["a"]}).select(pl.col("x").cast(pl.Int64)),
            pl.exceptions.InvalidOperationError,
            "conversion from `str` to `i64` failed",
        ),
        (
            pl.LazyFrame({"x": [1]}).join(pl.LazyFrame({"x": ["a"]}), on="x"),
            pl.exceptions.SchemaError,
            "datatypes of join keys",
        ),
        (
            pl.scan_parquet("s3://your-bucket/missing/"),
            pl.exceptions.ComputeError,
            "expanded paths were empty",
        ),
        (pl.scan_parquet("s3://nobodys-bucket/x.parquet"), FileNotFoundError, "not found"),
        (pl.scan_csv("/missing/x.csv"), FileNotFoundError, "/missing/x.csv"),
    ],
)
def test_failed_query_raises_the_exception_of_the_worker(
    pc: ModuleType, context: Any, frame: pl.LazyFrame, error: type[Exception], match: str
) -> None:
    query = frame.remote(context).sink_parquet("s3://your-bucket/never/")
    with pytest.raises(error, match=match):
        query.await_result()
    assert query.get_status() is pc.QueryStatus.FAILED
    result = query.await_result(raise_on_failure=False)
    assert (result.status, result.location) == (pc.QueryStatus.FAILED, [])


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        (ZeroDivisionError("division by zero"), ZeroDivisionError),
        (KeyError("region"), KeyError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ValueError),
        (LookupError("text: with, punctuation\nand lines"), LookupError),
    ],
)
def test_exception_of_a_user_function_keeps_its_type(
    context: Any, raised: Exception, caught: type[Exception]
) -> None:
    def fail(df: pl.DataFrame) -> pl.DataFrame:
        raise raised

    query = pl.LazyFrame({"x": [1]}).map_batches(fail).remote(context).execute(blocking=False)
    with pytest.raises(caught) as error:
        query.await_result()
    assert type(error.value) is caught
    assert str(raised) in str(error.value)
    assert pl.LazyFrame({"x": [1]}).remote(context).execute().n_rows_total == 1


@pytest.mark.parametrize(
    ("make_bucket", "error", "match"),
    [
        (create_bucket_of_others, PermissionError, "lacked the necessary privileges"),
        (create_bucket_elsewhere, OSError, "redirect .* incorrectly configured region"),
    ],
)
def test_bucket_refuses_queries_as_its_policy_and_its_region_say(
    context: Any, make_bucket: Callable[[str], None], error: type[Exception], match: str
) -> None:
    bucket = f"of-query-results-{error.__name__.lower()}"
    make_bucket(bucket)
    with pytest.raises(error, match=match):
        one_row().remote(context).sink_parquet(f"s3://{bucket}/x/").await_result()
    with pytest.raises(error, match=match):
        pl.scan_parquet(f"s3://{bucket}/x.parquet").remote(context).execute()


def test_bucket_in_another_region_is_there_for_who_looks_there(context: Any) -> None:
    create_bucket_elsewhere("somewhere-else")
    target, options = "s3://somewhere-else/x/", {"aws_region": "eu-west-1"}
    query = one_row().remote(context).sink_parquet(target, storage_options=options)
    assert query.await_result().n_rows_total == 1
    assert pl.read_parquet(target, storage_options=options).height == 1


def test_labels_and_user_are_recorded(
    emulator: RunningEmulator, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLARS_CLOUD_USER_NAME", "daily-report")
    remote = pl.LazyFrame({"x": [1]}).remote(context).labels(["daily", "run 1"])
    remote.execute()
    [query] = emulator.state()["queries"]
    assert query["labels"] == ["daily", "run 1"]
    assert query["user"] == "daily-report"
    assert query["n_rows"] == 1
    assert query["submitted_at"] <= query["started_at"] < query["ended_at"]


@pytest.mark.parametrize("select", ["x", "nope"])
def test_observatory_gives_the_details_of_a_query(context: Any, select: str) -> None:
    remote = pl.LazyFrame({"x": [1, 2]}).select(select).remote(context).single_node()
    query = remote.execute(blocking=False)
    query.await_result(raise_on_failure=False)
    details = query._client.get_query_details(query._query_id)
    succeeded = select == "x"
    assert details.id == str(query._query_id)
    assert details.status == ("Success" if succeeded else "Failed")
    assert (details.engine, details.query_type) == ("Streaming", "Single")
    assert details.finished_stages == ([0] if succeeded else [])
    assert details.in_progress_stages == []
    assert details.output_rows == (2 if succeeded else None)
    assert details.total_node_time_ns > 0
