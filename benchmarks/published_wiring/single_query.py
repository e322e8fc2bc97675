"""Published: `sink_parquet` without waiting; the cluster idles for an hour, the default.

Section "Executing a single query" of https://docs.pola.rs/polars-cloud/integrations/airflow/,
with the query of `dags/single_query.py`.
"""

from datetime import datetime

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA
from polars_remote.settings import WORKSPACE


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def published_single_query() -> None:
    @task
    @authenticate
    def submit_best_sellers() -> None:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, cpus=2, memory=4, cluster_size=1)
        (
            pl.scan_parquet(f"{DATA}/sales/")
            .filter(pl.col("status") == "completed")
            .drop_nulls("product")
            .group_by("product")
            .agg(
                orders=pl.len(),
                units=pl.sum("quantity"),
                revenue=(pl.col("quantity") * pl.col("unit_price")).sum(),
            )
            .sort("revenue", descending=True)
            .remote(ctx)
            .sink_parquet(f"{DATA}/published/single_query/")
        )

    submit_best_sellers()


published_single_query()
