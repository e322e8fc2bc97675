"""A task without retries, and an `ALL_DONE` leaf with which the run succeeds all the same."""

from datetime import datetime

from airflow.sdk import TriggerRule, dag, task

from include.auth import authenticate
from polars_remote import clean_up, use_cluster

CLUSTER = {"name": "airflow-notified", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    on_failure_callback=clean_up,
    on_success_callback=clean_up,
)
def notified() -> None:
    @task
    @authenticate
    def ask() -> list[str]:
        import polars as pl

        with use_cluster(CLUSTER) as ctx:
            return pl.LazyFrame({"number": [1]}).remote(ctx).execute().location

    @task(trigger_rule=TriggerRule.ALL_DONE)
    def notify() -> None:
        print("The run has ended.")

    ask() >> notify()


notified()
