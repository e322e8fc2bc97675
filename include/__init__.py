"""Modules that the DAGs share: login, shop, preflight and `polars_remote/`."""
