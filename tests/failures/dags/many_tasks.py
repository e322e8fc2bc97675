"""Many mapped tasks of different durations on a shared cluster."""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from polars_remote import clean_up, shared_cluster, use_cluster

CLUSTER = {
    "name": "airflow-many-tasks",
    "cpus": 2,
    "memory": 4,
    "cluster_size": 2,
    "idle_timeout_mins": 10,
}
TASKS = 24


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    on_failure_callback=clean_up,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1)},
)
def many_tasks() -> None:
    @task
    @authenticate
    def count_up(number: int) -> list[str]:
        import polars as pl

        # Takes from milliseconds to a second.
        rows = 10**5 * (number % 8) ** 3
        numbers = pl.LazyFrame().select(pl.int_range(rows).shuffle(seed=1).sort().sum())
        with use_cluster(CLUSTER) as ctx:
            return numbers.remote(ctx).single_node().execute().location

    with shared_cluster(CLUSTER):
        count_up.expand(number=list(range(TASKS)))


many_tasks()
