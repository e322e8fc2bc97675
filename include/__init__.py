"""Shared by the DAGs: login, shop, preflight, and the folder `polars_remote/`."""
