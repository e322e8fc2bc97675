"""Data location, tables and manifest of the shop.

Edit this file. The location and the manifest's name can be set by environment variables as well.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from polars_remote.cloud.session import uses_emulator
from polars_remote.compat.versions import AirflowFailException

if TYPE_CHECKING:
    import polars as pl

    Schema = dict[str, pl.DataType | type[pl.DataType]]

PLACEHOLDER = "s3://your-bucket"
"""Default data location: a bucket of the emulator."""

DATA = os.environ.get("POLARS_CLOUD_DATA", PLACEHOLDER).rstrip("/")
"""URI of the folder with the tables `sales/`, `inventory/` and `returns/`, and with the results."""

MANIFEST = os.environ.get("POLARS_CLOUD_MANIFEST", "airflow-production")
"""Name of the manifest that `manifest_reuse` registers."""


def get_schemas() -> dict[str, Schema]:
    """Return the columns of each table that the DAGs read, with their types."""
    import polars as pl  # here: importing Polars slows down parsing

    money = pl.Decimal(10, 2)
    return {
        "sales": {
            "date": pl.Date,
            "order_id": pl.Int64,
            "line": pl.Int64,
            "region": pl.String,
            "customer_id": pl.Int64,
            "status": pl.String,
            "product": pl.String,
            "quantity": pl.Int64,
            "unit_price": money,
        },
        "inventory": {
            "date": pl.Date,
            "region": pl.String,
            "product": pl.String,
            "category": pl.String,
            "unit_cost": money,
            "on_hand": pl.Int64,
        },
        "returns": {
            "date": pl.Date,
            "product": pl.String,
            "quantity": pl.Int64,
            "refund": money,
            "reason": pl.String,
        },
    }


def scan(table: str) -> pl.LazyFrame:
    """Scan one of the shop's tables with the types of its schema.

    Raises
    ------
    AirflowFailException
        There is no such table; or see `check_data_location`.
    """
    check_data_location()
    schemas = get_schemas()
    if table not in schemas:
        raise AirflowFailException(
            f"There is no table '{table}' in include/shop.py. Correct its name, or add its "
            f"columns to get_schemas. There are {', '.join(schemas)}"
        )
    return scan_files(f"{DATA}/{table}/", schemas[table])


def scan_files(source: Any, schema: Schema) -> pl.LazyFrame:
    """Scan Parquet files, and cast their columns to the types of a schema.

    Integers and floats are widened, categories become strings, and a Datetime becomes the Date in
    its own time zone. The query fails if a column has any other type or is missing. Columns that
    the schema lacks are ignored. A later file must have the types of the first file, or narrower
    types.

    Parameters
    ----------
    source
        Source, as for `polars.scan_parquet`.
    """
    import polars as pl
    import polars.selectors as cs

    days = [name for name, kind in schema.items() if kind == pl.Date]
    return (
        # Not `schema=`: with it, an empty folder would be read as a table without rows.
        pl.scan_parquet(
            source,
            extra_columns="ignore",
            cast_options=pl.ScanCastOptions(
                integer_cast="upcast",
                float_cast="upcast",
                datetime_cast=["upcast", "downcast"],
                categorical_to_string="allow",
            ),
        )
        # A Date is not cast, so that a filter on it skips row groups.
        .with_columns(
            (cs.by_name(days, require_all=False) - cs.date()).dt.date(),
            (cs.categorical() | cs.enum()).cast(pl.String),
        )
        .match_to_schema(schema, extra_columns="ignore", integer_cast="upcast", float_cast="upcast")
    )


def check_data_location() -> None:
    """Refuse a data location that no cluster could use, before a cluster is started.

    Raises
    ------
    AirflowFailException
        Not retried: the location has no scheme or no bucket, or it is the emulator's bucket while
        the worker talks to the real Polars Cloud.
    """
    url = urlsplit(DATA)
    if not url.scheme or not url.netloc:
        problem = f"is '{DATA}', which has no {'bucket' if url.scheme else 'scheme'}"
    elif DATA == PLACEHOLDER and not uses_emulator():
        problem = f"is not set, and its default {PLACEHOLDER} exists only in the emulator"
    else:
        return
    raise AirflowFailException(
        f"POLARS_CLOUD_DATA {problem}. Set it to the URI of the folder with your tables, "
        "such as s3://my-bucket/shop"
    )
