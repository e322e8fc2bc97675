from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from polars_cloud_emulator.sample_data import DAYS, parquet_files, shop_tables

LAST_DAY = date(2026, 11, 23)
FIRST_DAY = LAST_DAY - timedelta(days=DAYS - 1)
LINE = ["order_id", "line"]
REGIONS = ["Centre", "East", "North", "South", "West"]

Tables = dict[str, pl.DataFrame]


@pytest.fixture(scope="module")
def tables() -> Tables:
    return shop_tables(LAST_DAY)


def clean(sales: pl.DataFrame) -> pl.DataFrame:
    return (
        sales.unique(LINE)
        .filter(pl.col("product").is_not_null(), pl.col("quantity") > 0, pl.col("status") != "?")
        .with_columns(pl.col("region").str.strip_chars().str.to_titlecase())
    )


def completed(sales: pl.DataFrame) -> pl.DataFrame:
    return clean(sales).filter(pl.col("status") == "completed")


def test_same_last_day_gives_the_same_files_byte_for_byte() -> None:
    first = parquet_files(LAST_DAY)
    parquet_files.cache_clear()
    assert parquet_files(LAST_DAY) == first


def test_a_known_day_reads_the_same_on_every_machine_and_version(tables: Tables) -> None:
    day = tables["sales"].filter(pl.col("date") == LAST_DAY)
    revenue = pl.col("quantity") * pl.col("unit_price")
    figures = day.select(pl.n_unique("order_id"), pl.len(), revenue=revenue.sum())
    assert figures.row(0) == (1131, 2009, Decimal("53390.75"))


@pytest.mark.parametrize("last_day", [date(2024, 2, 29), date(2027, 1, 1), LAST_DAY])
def test_every_day_of_the_window_has_sales_stock_and_returns(last_day: date) -> None:
    first_day = last_day - timedelta(days=DAYS - 1)
    window = pl.date_range(first_day, last_day, eager=True).to_list()
    tables = shop_tables(last_day)
    assert tables["sales"]["date"].unique(maintain_order=True).to_list() == window
    assert tables["inventory"]["date"].unique(maintain_order=True).to_list() == window
    # The first day has no returns, because their sales would be before the window.
    assert tables["returns"]["date"].unique(maintain_order=True).to_list() == window[1:]


def test_a_day_does_not_depend_on_when_the_data_was_made(tables: Tables) -> None:
    for days_later in range(1, 8):
        later = shop_tables(LAST_DAY + timedelta(days=days_later))
        overlap = pl.col("date").is_between(FIRST_DAY + timedelta(days=days_later), LAST_DAY)
        for name in ("sales", "inventory"):
            assert later[name].filter(overlap).equals(tables[name].filter(overlap))


def test_each_day_has_one_order_of_each_kind_of_dirt(tables: Tables) -> None:
    sales = tables["sales"]
    region = pl.col("region")
    padded = region != region.str.strip_chars()
    lower_case = region == region.str.to_lowercase()
    duplicates = sales.filter(sales.is_duplicated())
    dirt = {
        "null product": sales.filter(pl.col("product").is_null()),
        "zero quantity": sales.filter(pl.col("quantity") == 0),
        "negative quantity": sales.filter(pl.col("quantity") < 0),
        "duplicated line": duplicates.unique(),
        "unknown status": sales.filter(pl.col("status") == "?").unique("order_id"),
        "lower-case region": sales.filter(lower_case).unique("order_id"),
        "padded region": sales.filter(padded).unique("order_id"),
    }
    for kind, rows in dirt.items():
        assert rows["date"].n_unique() == rows.height == DAYS, kind
    assert duplicates.height == 2 * DAYS


def test_apart_from_the_dirt_sales_are_in_order(tables: Tables) -> None:
    sales = clean(tables["sales"]).sort(LINE)
    assert set(sales["region"]) == set(REGIONS)
    assert set(sales["status"]) == {"completed", "cancelled", "pending"}
    assert sales["quantity"].is_between(1, 5).all()
    assert sales["sold_at"].is_sorted()
    assert sales["sold_at"].dt.date().equals(sales["date"])
    assert set(sales["product"]) == set(tables["inventory"]["product"])
    assert sales.select("product", "unit_price").unique().height == sales["product"].n_unique()
    orders = sales.unique("order_id")
    assert 0.04 < (orders["status"] == "cancelled").sum() / orders.height < 0.06
    order = ["order_id", "sold_at", "region", "customer_id", "status"]
    assert sales.select(order).unique().height == orders.height


def test_saturday_is_the_busiest_day_of_the_week(tables: Tables) -> None:
    orders = tables["sales"].unique("order_id").group_by(pl.col("date").dt.weekday()).len()
    assert orders.sort("len")["date"].last() == 6


def test_every_return_matches_a_completed_sale(tables: Tables) -> None:
    returns = tables["returns"]
    matched = returns.join(completed(tables["sales"]), on=LINE, suffix="_sold")
    assert matched.height == returns.height == returns.unique(LINE).height
    assert matched["product"].equals(matched["product_sold"])
    assert (matched["date"] - matched["date_sold"]).dt.total_days().is_between(1, 14).all()
    assert matched.filter(~pl.col("quantity").is_between(1, pl.col("quantity_sold"))).is_empty()
    assert matched.filter(pl.col("refund") != pl.col("quantity") * pl.col("unit_price")).is_empty()


def test_stock_falls_by_the_units_sold_since_monday(tables: Tables) -> None:
    shelf = ["region", "product"]
    inventory = tables["inventory"]
    assert inventory.unique(["date", *shelf]).height == inventory.height == DAYS * 5 * 120
    assert inventory["on_hand"].is_between(0, 240).all()
    sunday = LAST_DAY - timedelta(days=1)
    week = completed(tables["sales"]).filter(
        pl.col("date").is_between(sunday - timedelta(days=6), sunday)
    )
    units = week.group_by(shelf).agg(pl.sum("quantity"))
    closing = inventory.filter(pl.col("date") == sunday).join(units, on=shelf, how="left")
    assert closing.filter(pl.col("on_hand") != 240 - pl.col("quantity").fill_null(0)).is_empty()
    assert closing["on_hand"].n_unique() > 50


def test_monthly_files_hold_the_tables_in_a_few_megabytes(tables: Tables, tmp_path: Path) -> None:
    files = dict(parquet_files(LAST_DAY))
    months = ["2026-08", "2026-09", "2026-10", "2026-11"]
    assert list(files) == [f"{name}/{month}.parquet" for name in tables for month in months]
    assert sum(map(len, files.values())) < 6_000_000
    for key, content in files.items():
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(content)
    for name, table in tables.items():
        assert pl.scan_parquet(tmp_path / name).collect().equals(table)
        assert pl.scan_parquet(tmp_path / name / "*.parquet").collect().equals(table)
