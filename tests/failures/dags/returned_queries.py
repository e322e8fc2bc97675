"""Tasks that return several queries: on two clusters in a dict, and mapped in a task group."""

from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import dag, task, task_group

from include.auth import authenticate
from include.shop import DATA
from polars_remote import Query, clean_up, query_task, use_cluster

RESULTS = f"{DATA}/results/returned_queries"
CLUSTERS = [
    {"name": f"airflow-returned-queries-{name}", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}
    for name in ("a", "b")
]


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    on_failure_callback=clean_up,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=1)},
)
def returned_queries() -> None:
    @query_task(multiple_outputs=True)
    @authenticate
    def ask_two_clusters() -> dict[str, Any]:
        import polars as pl

        frame = pl.LazyFrame({"number": [1, 2, 3]})
        with use_cluster(CLUSTERS[0]) as a, use_cluster(CLUSTERS[1]) as b:
            files = [
                frame.remote(a).single_node().sink_csv(f"{RESULTS}/one.csv"),
                frame.remote(a).single_node().sink_parquet(f"{RESULTS}/two.parquet"),
            ]
            total = frame.sum().remote(b).execute(blocking=False)
            return {"files": files, "sum": total, "day": "today"}

    @query_task
    @authenticate
    def ask_for(number: int, factor: int) -> Query:
        import polars as pl

        product = pl.LazyFrame({"product": [number * factor]})
        with use_cluster(CLUSTERS[0]) as ctx:
            return product.remote(ctx).single_node().sink_parquet(f"{RESULTS}/{number}.parquet")

    @task
    def check(files: list[list[str]], total: list[str], day: str, products: Any) -> None:
        assert files == [[f"{RESULTS}/one.csv"], [f"{RESULTS}/two.parquet"]], files
        assert len(total) == 1, total
        assert day == "today"
        assert list(products) == [[f"{RESULTS}/1.parquet"], [f"{RESULTS}/2.parquet"]], products

    @task_group
    def ask_many() -> Any:
        return ask_for.partial(factor=10).expand(number=[1, 2])

    answer = ask_two_clusters()
    check(answer["files"], answer["sum"], answer["day"], ask_many())


returned_queries()
