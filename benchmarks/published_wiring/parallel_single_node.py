"""Published: parallel tasks that each submit a single-node query without waiting for it.

Section "Parallel query execution" of https://docs.pola.rs/polars-cloud/integrations/airflow/, with
the queries of `dags/parallel_single_node.py`. The tasks are mapped as in that DAG; the page spells
out three of them. No task waits for a query or stops the cluster. The manifest is registered once,
outside the DAG.
"""

from datetime import datetime

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA, MANIFEST
from polars_remote.settings import WORKSPACE

REGIONS = ["Centre", "East", "North", "South", "West"]


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def published_parallel_single_node() -> None:
    @task
    @authenticate
    def rank_products(region: str) -> None:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        revenue = (pl.col("quantity") * pl.col("unit_price")).sum()
        (
            pl.scan_parquet(f"{DATA}/sales/")
            .filter(pl.col("region") == region, pl.col("status") == "completed")
            .drop_nulls("product")
            .group_by("product")
            .agg(units=pl.sum("quantity"), revenue=revenue)
            .sort("revenue", "product", descending=[True, False])
            .remote(ctx)
            .single_node()
            .sink_parquet(f"{DATA}/published/parallel_single_node/{region}/")
        )

    rank_products.expand(region=REGIONS)


published_parallel_single_node()
