"""The line of Polars Cloud's documentation, which does not wait for its query."""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA
from polars_remote import clean_up, use_cluster

RESULT = f"{DATA}/results/published_line/"
CLUSTER = {"name": "airflow-published-line", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    on_failure_callback=clean_up,
    on_success_callback=clean_up,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1)},
)
def published_line() -> None:
    @task
    @authenticate
    def ask() -> None:
        import polars as pl

        with use_cluster(CLUSTER) as ctx:
            pl.LazyFrame({"number": [1]}).remote(context=ctx).sink_parquet(RESULT)

    ask()


published_line()
