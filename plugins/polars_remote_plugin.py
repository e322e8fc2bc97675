"""Airflow looks for plugins in this folder: here is that of `polars_remote`."""

from polars_remote.plugin import PolarsCloudPlugin

__all__ = ["PolarsCloudPlugin"]
