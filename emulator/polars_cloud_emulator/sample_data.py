"""Sample data of one small shop: sales, stock and returns, up to a given day.

Every value depends only on its calendar day and a fixed seed: the sales of a day are the same
whenever the emulator starts. `emulator/README.md` describes the tables.
"""

import functools
from collections.abc import Sequence
from datetime import date, timedelta
from decimal import Decimal
from io import BytesIO
from zlib import crc32

import polars as pl

SEED = 2026
DAYS = 90

PRICES = {
    "paper": {"notebook": "4.90", "sketchbook": "8.50", "envelopes": "3.20", "planner": "14.90"},
    "writing": {"pencil": "0.95", "ballpoint": "1.80", "fountain pen": "24.50", "marker": "2.60"},
    "desk": {"stapler": "9.90", "tape dispenser": "7.40", "pen cup": "6.30", "lamp": "39.00"},
    "bags": {"pencil case": "11.20", "tote bag": "15.80", "backpack": "54.00", "folder": "5.60"},
    "art": {"watercolours": "18.70", "brush set": "12.40", "pastels": "16.30", "easel": "47.50"},
    "gifts": {"mug": "10.50", "candle": "8.90", "postcards": "2.20", "wrapping paper": "3.80"},
}
COLOURS = ["black", "white", "red", "blue", "green"]
REGIONS = ["North", "South", "East", "West", "Centre"]
ORDERS_FROM_MONDAY = [1050, 1000, 1050, 1100, 1250, 1750, 1450]
STATUSES = ["completed"] * 92 + ["cancelled"] * 5 + ["pending"] * 3
RETURN_REASONS = ["damaged", "wrong colour", "changed my mind", None]
CUSTOMERS = 5000
FULL_SHELF = 240

# Dirty orders, by their number within each day.
NULL_PRODUCT, ZERO_QUANTITY, NEGATIVE_QUANTITY, DUPLICATED_LINE = 101, 202, 303, 404
UNKNOWN_STATUS, LOWER_CASE_REGION, PADDED_REGION = 505, 606, 707

MONEY = pl.Decimal(10, 2)
ORDER_NUMBERS = 10_000  # order_id is the day's YYYYMMDD followed by a number of four digits
LINE_ID = pl.col("order_id") * 10 + pl.col("line")


def shop_tables(last_day: date) -> dict[str, pl.DataFrame]:
    """Return the tables `sales`, `inventory` and `returns` of the `DAYS` days up to `last_day`.

    Each has a column `date` and is sorted by it. The same `last_day` gives equal tables.
    """
    first_day = last_day - timedelta(days=DAYS - 1)
    # Stock depends on all sales since Monday, including those before the first day.
    monday = first_day - timedelta(days=first_day.weekday())
    days = pl.select(date=pl.date_range(monday, last_day))
    products = _products()
    lines = _order_lines(days, products)
    sold = lines.filter(
        pl.col("status") == "completed", pl.col("product").is_not_null(), pl.col("quantity") > 0
    )
    tables = {
        "sales": _with_misspelt_regions_and_duplicates(lines),
        "inventory": _inventory(days, products, sold),
        "returns": _returns(sold.filter(pl.col("date") >= first_day)),
    }
    return {
        name: table.filter(pl.col("date").is_between(first_day, last_day))
        for name, table in tables.items()
    }


@functools.lru_cache(maxsize=1)
def parquet_files(last_day: date) -> tuple[tuple[str, bytes], ...]:
    """Return object key and Parquet bytes of each month of each of the `shop_tables`.

    A key looks like `sales/2026-01.parquet`. The same `last_day` gives the same bytes.
    """
    files = []
    for name, table in shop_tables(last_day).items():
        months = table.group_by(pl.col("date").dt.month_start(), maintain_order=True)
        for (month,), rows in months:
            buffer = BytesIO()
            rows.write_parquet(buffer, compression="zstd")
            files.append((f"{name}/{month:%Y-%m}.parquet", buffer.getvalue()))
    return tuple(files)


def _products() -> pl.DataFrame:
    """Return one row per product, most popular first."""
    rows = [
        (category, f"{item} {colour}", Decimal(price), Decimal(price) * 3 / 5)
        for category, prices in PRICES.items()
        for item, price in prices.items()
        for colour in COLOURS
    ]
    return pl.DataFrame(
        rows,
        {"category": pl.String, "product": pl.String, "unit_price": MONEY, "unit_cost": MONEY},
        orient="row",
    )


def _order_lines(days: pl.DataFrame, products: pl.DataFrame) -> pl.DataFrame:
    """Return the sales of `days`, with null products, invalid quantities and unknown statuses."""
    order_id, number = pl.col("order_id"), pl.col("number")
    usual_orders = _pick(ORDERS_FROM_MONDAY, pl.col("date").dt.weekday() - 1)
    orders = (
        days.with_columns(day_id=pl.col("date").dt.strftime("%Y%m%d").cast(pl.Int64))
        .with_columns(orders=usual_orders + _draw(pl.col("day_id"), "orders", 100))
        .with_columns(number=pl.int_ranges(1, pl.col("orders") + 1))
        .explode("number")
        .with_columns(order_id=pl.col("day_id") * ORDER_NUMBERS + number)
        .with_columns(
            sold_at=_time_of_sale(),
            region=_pick(REGIONS, _draw(order_id, "region", len(REGIONS))),
            customer_id=pl.when(_draw(order_id, "guest", 6) > 0).then(
                1 + _draw(order_id, "customer", CUSTOMERS)
            ),
            status=pl.when(number == UNKNOWN_STATUS)
            .then(pl.lit("?"))
            .otherwise(_pick(STATUSES, _draw(order_id, "status", len(STATUSES)))),
            line=pl.int_ranges(1, 2 + _draw(order_id, "lines", 5) // 2),
        )
    )
    # The minimum of two draws makes small values more frequent.
    product = pl.min_horizontal(_draw(LINE_ID, f"product {n}", len(products)) for n in "ab")
    quantity = 1 + pl.min_horizontal(_draw(LINE_ID, f"quantity {n}", 5) for n in "ab")
    first_line = pl.col("line") == 1
    return orders.explode("line").select(
        "date",
        "sold_at",
        "order_id",
        "line",
        "region",
        "customer_id",
        "status",
        product=pl.when(~first_line | (number != NULL_PRODUCT)).then(
            _pick(products["product"], product)
        ),
        quantity=pl.when(first_line & (number == ZERO_QUANTITY))
        .then(0)
        .when(first_line & (number == NEGATIVE_QUANTITY))
        .then(-quantity)
        .otherwise(quantity),
        unit_price=_pick(products["unit_price"], product),
    )


def _time_of_sale() -> pl.Expr:
    """Return the time of a sale, from 08:00 to 20:00 UTC, in the order of the order numbers."""
    open_seconds = 12 * 3600
    jitter = _draw(pl.col("order_id"), "time", open_seconds)
    second = ((pl.col("number") - 1) * open_seconds + jitter) // pl.col("orders")
    midnight = pl.col("date").cast(pl.Datetime("us", "UTC"))
    return midnight + pl.duration(hours=8, seconds=second)


def _with_misspelt_regions_and_duplicates(lines: pl.DataFrame) -> pl.DataFrame:
    number, region = pl.col("order_id") % ORDER_NUMBERS, pl.col("region")
    duplicates = lines.filter(number == DUPLICATED_LINE, pl.col("line") == 1)
    return (
        pl.concat([lines, duplicates])
        .sort("order_id", "line")
        .with_columns(
            region=pl.when(number == LOWER_CASE_REGION)
            .then(region.str.to_lowercase())
            .when(number == PADDED_REGION)
            .then(" " + region + " ")
            .otherwise(region)
        )
    )


def _inventory(days: pl.DataFrame, products: pl.DataFrame, sold: pl.DataFrame) -> pl.DataFrame:
    """Return the stock at the close of each day; shelves are refilled each Monday morning."""
    shelf = ["date", "region", "product"]
    units_sold = sold.group_by(shelf).agg(pl.sum("quantity"))
    week = pl.col("date").dt.truncate("1w")
    sold_this_week = pl.col("quantity").fill_null(0).cum_sum().over(week, "region", "product")
    return (
        days.join(pl.DataFrame({"region": REGIONS}), how="cross")
        .join(products, how="cross")
        .join(units_sold, on=shelf, how="left", maintain_order="left")
        .select(*shelf, "category", "unit_cost", on_hand=FULL_SHELF - sold_this_week)
    )


def _returns(sold: pl.DataFrame) -> pl.DataFrame:
    """Return the returns: one sold line in eight, in whole or in part, 1 to 14 days later."""
    return (
        sold.filter(_draw(LINE_ID, "returned", 8) == 0)
        .with_columns(quantity=1 + _draw(LINE_ID, "returned quantity", pl.col("quantity")))
        .select(
            pl.col("date") + pl.duration(days=1 + _draw(LINE_ID, "days to return", 14)),
            "order_id",
            "line",
            "product",
            "quantity",
            refund=(pl.col("unit_price") * pl.col("quantity")).cast(MONEY),
            reason=_pick(RETURN_REASONS, _draw(LINE_ID, "reason", len(RETURN_REASONS))),
        )
        .sort("date", "order_id", "line")
    )


def _pick(values: Sequence[object] | pl.Series, index: pl.Expr) -> pl.Expr:
    return pl.lit(pl.Series(values)).gather(index)


def _draw(key: pl.Expr, what: str, below: int | pl.Expr) -> pl.Expr:
    """Return a pseudorandom number from 0 to `below` - 1 that depends only on `key` and `what`.

    Not `Expr.hash`, whose values may change with a release of Polars.
    """
    seed = crc32(f"{SEED} {what}".encode())
    bits = key.cast(pl.UInt64) * pl.lit(0x9E3779B97F4A7C15, pl.UInt64) + seed
    bits = (bits ^ bits // 2**32) * pl.lit(0xBF58476D1CE4E5B9, pl.UInt64)
    return ((bits ^ bits // 2**32) % below).cast(pl.Int64)
