"""The DAGs of `task_calls.py`. Each task has at most one query, except in `many_queries`."""

from typing import Any

from airflow.sdk import dag, task

from include.auth import authenticate
from polars_remote import Query, query_task, shared_cluster, use_cluster

CLUSTER = {"name": "airflow-task-calls", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}
RESULTS = "s3://your-bucket/results/task_calls"


def sink(ctx: Any, name: str) -> Any:
    import polars as pl

    return pl.LazyFrame({"x": [1]}).remote(ctx).single_node().sink_parquet(f"{RESULTS}/{name}.pq")


@dag(schedule=None)
def does_nothing() -> None:
    @task
    def run() -> None:
        pass

    run()


@dag(schedule=None)
def plain() -> None:
    @task
    @authenticate
    def run() -> list[str] | None:
        with use_cluster(CLUSTER) as ctx:
            location: list[str] | None = sink(ctx, "plain").await_result().location
            return location

    run()


@dag(schedule=None)
def left_running() -> None:
    @task
    @authenticate
    def run() -> list[str] | None:
        with use_cluster(CLUSTER, stop=False) as ctx:
            location: list[str] | None = sink(ctx, "left_running").await_result().location
            return location

    run()


@dag(schedule=None)
def deferred() -> None:
    @query_task
    @authenticate
    def run() -> Query:
        with use_cluster(CLUSTER) as ctx:
            return sink(ctx, "deferred")

    run()


def make_mapped(count: int) -> None:
    @dag(dag_id=f"mapped_{count}", schedule=None)
    def mapped() -> None:
        @query_task
        @authenticate
        def run(number: int) -> Query:
            with use_cluster(CLUSTER) as ctx:
                return sink(ctx, f"mapped/{number}")

        with shared_cluster(CLUSTER):
            run.expand(number=list(range(count)))

    mapped()


@dag(schedule=None)
def many_queries() -> None:
    @query_task
    @authenticate
    def run() -> list[Query]:
        with use_cluster(CLUSTER) as ctx:
            return [sink(ctx, f"many/{number}") for number in range(100)]

    run()


for count in (5, 50, 200):
    make_mapped(count)
does_nothing()
plain()
left_running()
deferred()
many_queries()
