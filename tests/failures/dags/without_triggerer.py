"""A deferred task that no triggerer watches."""

from datetime import datetime, timedelta

from airflow.sdk import dag

from include.auth import authenticate
from polars_remote import Query, clean_up, query_task, use_cluster
from polars_remote.waiting import deferral

CLUSTER = {"name": "airflow-without-triggerer", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    on_failure_callback=clean_up,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1)},
)
def without_triggerer() -> None:
    @query_task
    @authenticate
    def ask() -> Query:
        import polars as pl

        deferral.SHORTEST_TRIGGER_TIMEOUT = deferral.TIMEOUT_MARGIN_SECONDS = 2.0
        with use_cluster(CLUSTER) as ctx:
            return pl.LazyFrame({"number": [1]}).remote(ctx).execute(blocking=False)

    ask()


without_triggerer()
