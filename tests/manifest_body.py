"""Body of a raw request that registers a manifest, with the installed versions."""

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
