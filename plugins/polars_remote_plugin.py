"""Airflow plugin of `polars_remote`, in the folder in which Airflow looks for plugins."""

from polars_remote.plugin import PolarsCloudPlugin

__all__ = ["PolarsCloudPlugin"]
