"""Mapped tasks that are deferred, many more than there are worker slots."""

from datetime import datetime

from airflow.sdk import dag

from include.auth import authenticate
from polars_remote import Query, clean_up, query_task, shared_cluster, use_cluster

CLUSTER = {"name": "airflow-held-queries", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}
TASKS = 50


@dag(schedule=None, start_date=datetime(2026, 1, 1), on_failure_callback=clean_up)
def held_queries() -> None:
    @query_task
    @authenticate
    def ask(number: int) -> Query:
        import polars as pl

        with use_cluster(CLUSTER) as ctx:
            return pl.LazyFrame({"number": [number]}).remote(ctx).execute(blocking=False)

    with shared_cluster(CLUSTER):
        ask.expand(number=list(range(TASKS)))


held_queries()
