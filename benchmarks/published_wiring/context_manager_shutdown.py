"""Published: one awaited query in `with ComputeContext(...)`, whose end stops the cluster.

Section "Context wrapper for immediate shutdown" of
https://docs.pola.rs/polars-cloud/integrations/airflow/, with the query of
`dags/context_manager_shutdown.py`.
"""

from datetime import datetime

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA
from polars_remote.settings import WORKSPACE


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def published_context_manager_shutdown() -> None:
    @task
    @authenticate
    def value_stock() -> None:
        import polars as pl
        import polars_cloud as pc

        with pc.ComputeContext(workspace=WORKSPACE, cpus=2, memory=4, cluster_size=1) as ctx:
            query = (
                pl.scan_parquet(f"{DATA}/inventory/")
                .group_by("date", "category")
                .agg(
                    units=pl.sum("on_hand"),
                    value=(pl.col("on_hand") * pl.col("unit_cost")).sum(),
                )
                .sort("date", "category")
                .remote(ctx)
                .sink_parquet(f"{DATA}/published/context_manager_shutdown/")
            )
            query.await_result()
            if query.get_status() != pc.QueryStatus.SUCCESS:
                raise ValueError("The query failed")

    value_stock()


published_context_manager_shutdown()
