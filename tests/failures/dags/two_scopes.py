"""Two shared clusters in one run; one is stopped while a query runs on the other."""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA
from polars_remote import clean_up, shared_cluster, use_cluster

LONG = {"name": "airflow-long", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}
SHORT = {"name": "airflow-short", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    on_failure_callback=clean_up,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1)},
)
def two_scopes() -> None:
    @task
    @authenticate
    def run_long() -> list[str]:
        import polars as pl

        with use_cluster(LONG) as ctx:
            sales = pl.scan_parquet(f"{DATA}/sales/").select(pl.len())
            return sales.remote(ctx).execute().location

    @task.sensor(poke_interval=0.5)
    def wait_for_long_query() -> bool:
        from airflow.sdk import Variable

        return Variable.get("gate", default="closed") == "open"

    @task
    @authenticate
    def run_short() -> list[str]:
        import polars as pl

        with use_cluster(SHORT) as ctx:
            returns = pl.scan_parquet(f"{DATA}/returns/").select(pl.len())
            return returns.remote(ctx).execute().location

    with shared_cluster(LONG):
        run_long()
    gate = wait_for_long_query()
    with shared_cluster(SHORT):
        gate >> run_short()


two_scopes()
