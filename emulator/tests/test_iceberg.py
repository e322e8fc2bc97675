"""Iceberg tables, whose files a worker writes and commits to the catalog."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pyiceberg.catalog.sql import SqlCatalog

from polars_cloud_emulator.testing import RunningEmulator

StartCluster = Callable[..., Any]

REQUIREMENTS = b"pyiceberg[pyarrow,sql-sqlite]\n"


def rows(height: int) -> pl.LazyFrame:
    data = {"x": range(height), "region": ["North", "South"] * (height // 2)}
    return pl.LazyFrame(data, schema={"x": pl.Int64, "region": pl.String})


@pytest.fixture
def storage(emulator: RunningEmulator) -> dict[str, str]:
    """Return pyiceberg's settings for the emulator's S3."""
    return {
        "s3.endpoint": emulator.environment["AWS_ENDPOINT_URL"],
        "s3.access-key-id": emulator.environment["AWS_ACCESS_KEY_ID"],
        "s3.secret-access-key": emulator.environment["AWS_SECRET_ACCESS_KEY"],
        "s3.region": emulator.environment["AWS_REGION"],
    }


@pytest.fixture
def make_table(storage: dict[str, str], tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    with contextlib.ExitStack() as catalogs:

        def make(warehouse: str) -> Any:
            catalog = SqlCatalog(
                "shop", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=warehouse, **storage
            )
            catalogs.callback(catalog.close)
            catalog.create_namespace("shop")
            return catalog.create_table("shop.sales", rows(0).collect().to_arrow().schema)

        yield make


def height(table: Any) -> int:
    count: int = table.refresh().scan().to_arrow().num_rows
    return count


@pytest.mark.parametrize("engine", ["streaming", "in-memory"])
def test_iceberg_sink_appends_and_overwrites(
    start_cluster: StartCluster,
    make_table: Callable[[str], Any],
    storage: dict[str, str],
    engine: str,
) -> None:
    context = start_cluster(requirements=REQUIREMENTS)
    table = make_table("s3://your-bucket/warehouse")
    with table.update_spec() as spec:
        spec.add_identity("region")
    heights = []
    for mode, target, written in [
        ("append", table, 8),
        ("append", "shop.sales", 4),
        ("overwrite", table, 20),
        ("append", table, 0),
        ("overwrite", "shop.sales", 4),
    ]:
        remote = rows(written).remote(context, engine=engine).single_node()
        result = remote.sink_iceberg(target, mode=mode, catalog=table.catalog).await_result()
        assert (result.n_rows_total, result.head.height) == (written, min(written, 10))
        assert result.location == ["s3://your-bucket/warehouse/shop/sales"]
        heights.append(height(table))
    assert heights == [8, 12, 20, 20, 4]
    scanned = pl.scan_iceberg(table, storage_options=storage).remote(context).execute()
    assert scanned.lazy().sort("x").collect().equals(rows(4).collect())


@pytest.mark.parametrize("requirements", [b"", b"pyiceberg\n"])
def test_iceberg_sink_is_refused_where_its_cluster_cannot_commit(
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    make_table: Callable[[str], Any],
    requirements: bytes,
) -> None:
    context = start_cluster(requirements=requirements)
    table = make_table("s3://your-bucket/warehouse")
    with pytest.raises(pl.exceptions.ComputeError, match=r"add 'pyiceberg\[pyarrow\]' to the"):
        rows(2).remote(context).sink_iceberg(table, mode="append")
    assert emulator.state()["queries"] == []


def test_iceberg_table_on_a_disk_is_refused(
    start_cluster: StartCluster, make_table: Callable[[str], Any], tmp_path: Path
) -> None:
    context = start_cluster(requirements=REQUIREMENTS)
    table = make_table(f"file://{tmp_path}/warehouse")
    query = rows(2).remote(context).sink_iceberg(table, mode="append")
    with pytest.raises(pl.exceptions.ComputeError, match="a local path is on the disk of a worker"):
        query.await_result()
    assert height(table) == 0
    assert not [*tmp_path.rglob("*.parquet")]
