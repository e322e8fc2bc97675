"""Data location and manifest of the shop. Edit this file, or set the environment variables."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from polars_remote.cloud.session import talks_to_emulator
from polars_remote.compat.versions import AirflowFailException

if TYPE_CHECKING:
    import polars as pl

PLACEHOLDER = "s3://your-bucket"
"""Default data location: a bucket of the emulator."""

DATA = os.environ.get("POLARS_CLOUD_DATA", PLACEHOLDER).rstrip("/")
"""URI below which `sales/`, `inventory/` and `returns/` are read and results are written."""

MANIFEST = os.environ.get("POLARS_CLOUD_MANIFEST", "airflow-production")
"""Name of the manifest that `manifest_reuse` registers."""


def scan(table: str) -> pl.LazyFrame:
    """Scan one of the shop's tables: `sales`, `inventory` or `returns`.

    Raises
    ------
    AirflowFailException
        As `check_data_location`.
    """
    import polars as pl  # here: importing Polars slows down parsing

    check_data_location()
    return pl.scan_parquet(f"{DATA}/{table}/")


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
    elif DATA == PLACEHOLDER and not talks_to_emulator():
        problem = f"is not set, and its default {PLACEHOLDER} is the emulator's"
    else:
        return
    raise AirflowFailException(
        f"POLARS_CLOUD_DATA {problem}. Set it to the URI below which your tables lie, such as "
        "s3://my-bucket/shop"
    )
