"""Where the DAGs run and where the shop's data lies: edit here, or set the variables."""

import os

PORTAL = os.environ.get("POLARS_CLOUD_PORTAL")
"""Address to which links to queries lead, with no slash at its end; None: Polars Cloud's own."""

WORKSPACE = os.environ.get("POLARS_CLOUD_WORKSPACE", "playground")
"""Name of the Polars Cloud workspace."""

MANIFEST = os.environ.get("POLARS_CLOUD_MANIFEST", "airflow-production")
"""Name of the manifest that `manifest_reuse` registers."""

DATA = os.environ.get("POLARS_CLOUD_DATA", "s3://your-bucket").rstrip("/")
"""URI below which `sales/`, `inventory/` and `returns/` are read and results are written."""

OUTAGE_SECONDS = float(os.environ.get("POLARS_CLOUD_OUTAGE", "120"))
"""Seconds for which Polars Cloud may be unavailable before a task gives up."""

DEFERS = os.environ.get("POLARS_CLOUD_DEFER", "1") != "0"
"""Whether a `@query_task` gives its worker slot back while it waits, which takes a triggerer."""
