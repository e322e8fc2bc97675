"""What registers a manifest past the client, with the versions that are installed here."""

import platform

import polars as pl

MAJOR, MINOR, PATCH = map(int, platform.python_version_tuple())
MANIFEST_BODY = {
    "specs": {"cpus": 2, "ram_gb": 4},
    "cluster_size": 1,
    "mode": "Direct",
    "python_version": {"major": MAJOR, "minor": MINOR, "patch": PATCH},
    "polars_version": pl.__version__,
}
