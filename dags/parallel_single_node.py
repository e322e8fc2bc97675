"""
### Many small queries, one node each

One mapped task per region submits a query that runs on a single node. Each node runs one query at a
time; the other queries wait in the cluster's queue. Use it when each query fits on one machine: no
data moves between machines, and more nodes run more queries at a time.

Each task returns the query that it has submitted, and Airflow defers the task until the query has
ended. Hundreds of tasks can wait at the same time, however few worker slots there are.

**Cost:** three nodes from `start_cluster` to `stop_cluster`. No worker slot while queries
run.

**Who stops the cluster:** `stop_cluster`, after the last query, as in `manual_shutdown`.

**Copy along:** the folders `include/` and `plugins/polars_remote/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag

from include.auth import authenticate
from include.shop import DATA, check_data_location, scan
from polars_remote import Query, clean_up, query_task, shared_cluster, use_cluster

RESULTS = f"{DATA}/results/parallel_single_node"
REGIONS = ["Centre", "East", "North", "South", "West"]
CLUSTER = {
    "name": "airflow-parallel-single-node",
    "cpus": 2,
    "memory": 4,
    "cluster_size": 3,
    "idle_timeout_mins": 10,
}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    dagrun_timeout=timedelta(hours=2),
    on_failure_callback=clean_up,
    on_success_callback=clean_up,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def parallel_single_node() -> None:
    @query_task(
        execution_timeout=timedelta(minutes=30), map_index_template="{{ task.op_kwargs.region }}"
    )
    @authenticate
    def rank_products(region: str) -> Query:
        # Not at the top: Airflow parses this file every few seconds, and importing Polars is slow.
        import polars as pl

        revenue = (pl.col("quantity") * pl.col("unit_price")).sum()
        ranking = (
            scan("sales")
            .filter(pl.col("region") == region, pl.col("status") == "completed")
            .drop_nulls("product")
            .group_by("product")
            .agg(units=pl.sum("quantity"), revenue=revenue)
            .sort("revenue", "product", descending=[True, False])
        )
        # Starts the cluster if it has stopped, for example if only this task was cleared.
        with use_cluster(CLUSTER) as ctx:
            return ranking.remote(ctx).single_node().sink_parquet(f"{RESULTS}/{region}.parquet")

    with shared_cluster(CLUSTER, check=check_data_location):
        rank_products.expand(region=REGIONS)


parallel_single_node()
