"""Published: block in `await_result`, then check the status; the cluster idles for an hour.

Section "Checking query status" of https://docs.pola.rs/polars-cloud/integrations/airflow/, with
the query of `dags/status_check.py`.
"""

from datetime import datetime

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA
from polars_remote.settings import WORKSPACE


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def published_status_check() -> None:
    @task
    @authenticate
    def count_order_statuses() -> None:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, cpus=2, memory=4, cluster_size=1)
        query = (
            pl.scan_parquet(f"{DATA}/sales/")
            .group_by("date", "status")
            .agg(lines=pl.len(), orders=pl.n_unique("order_id"))
            .sort("date", "status")
            .remote(ctx)
            .sink_parquet(f"{DATA}/published/status_check/")
        )
        query.await_result()
        status = query.get_status()
        if status != pc.QueryStatus.SUCCESS:
            raise ValueError(f"The query ended as {status}")

    count_order_statuses()


published_status_check()
