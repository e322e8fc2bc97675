"""A detached query in a run that also has a shared cluster."""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA
from polars_remote import clean_up, detach, shared_cluster, use_cluster

LEFT = {"name": "airflow-left", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}
SHARED = {"name": "airflow-shared", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    on_failure_callback=clean_up,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1)},
)
def left_beside_scope() -> None:
    @task
    @authenticate
    def submit_and_detach() -> str:
        import polars as pl

        sales = pl.scan_parquet(f"{DATA}/sales/").select(pl.len())
        with use_cluster(LEFT, stop=False) as ctx:
            return detach(sales.remote(ctx).execute(blocking=False))

    @task
    @authenticate
    def count_returns() -> list[str]:
        import polars as pl

        with use_cluster(SHARED) as ctx:
            returns = pl.scan_parquet(f"{DATA}/returns/").select(pl.len())
            return returns.remote(ctx).execute().location

    left = submit_and_detach()
    with shared_cluster(SHARED):
        left >> count_returns()


left_beside_scope()
