"""A query with Polars' own `RemoteEngine`, as in the documentation of Polars."""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA
from polars_remote import clean_up, use_cluster

RESULT = f"{DATA}/results/remote_engine/"
CLUSTER = {"name": "airflow-remote-engine", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    on_failure_callback=clean_up,
    on_success_callback=clean_up,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1)},
)
def remote_engine() -> None:
    @task(execution_timeout=timedelta(seconds=8))
    @authenticate
    def ask() -> None:
        import polars as pl

        with use_cluster(CLUSTER) as ctx:
            frame = pl.LazyFrame({"number": [1]})
            frame.sink_parquet(RESULT, engine=pl.RemoteEngine(context=ctx))

    ask()


remote_engine()
