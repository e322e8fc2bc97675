"""One task with two simultaneous queries on a cluster of its own."""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA
from polars_remote import clean_up, use_cluster

RESULTS = f"{DATA}/results/two_queries"
VERSION = "old"
CLUSTER = {
    "name": "airflow-two-queries",
    "cpus": 2,
    "memory": 4,
    "cluster_size": 2,
    "idle_timeout_mins": 10,
}


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    on_failure_callback=clean_up,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1)},
)
def two_queries() -> None:
    @task
    @authenticate
    def ask_twice() -> list[str]:
        import polars as pl

        frame = pl.LazyFrame({"version": [VERSION]})
        with use_cluster(CLUSTER) as ctx:
            remote = frame.remote(ctx).single_node()
            first = remote.sink_parquet(f"{RESULTS}/first.parquet")
            second = remote.sink_parquet(f"{RESULTS}/second.parquet")
            return [*first.await_result().location, *second.await_result().location]

    ask_twice()


two_queries()
