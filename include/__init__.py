"""What the DAGs share: `auth.py`, and the folder `polars_remote/`."""
