"""
### Many small queries, one node each

One mapped task per region, each with a query that runs on a single node, as many at a time as the
cluster has nodes; the others wait in the cluster's queue. Use it when each query fits on one
machine: none pays for moving data between machines, and more nodes mean more queries at a time.

The cluster is started once, before the queries, so that they do not race to start it, and stopped
after the last of them, as in `manual_shutdown`.

**What it costs:** three nodes from `start_cluster` to `stop_cluster`.

**Copy along:** `include/auth.py`, `include/clusters.py`, `include/queries.py`,
`include/settings.py`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.clusters import start_cluster, stop_cluster
from include.queries import wait_for
from include.settings import DATA, WORKSPACE

SALES = f"{DATA}/sales/"
RESULTS = f"{DATA}/results/parallel_single_node"
REGIONS = ["Centre", "East", "North", "South", "West"]
CLUSTER = {"cpus": 2, "memory": 4, "cluster_size": 3, "idle_timeout_mins": 10}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def parallel_single_node() -> None:
    @task(execution_timeout=timedelta(minutes=30), map_index_template="{{ task.op_kwargs.region }}")
    @authenticate
    def rank_products(cluster_id: str, region: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        revenue = (pl.col("quantity") * pl.col("unit_price")).sum()
        query = (
            pl.scan_parquet(SALES)
            .filter(pl.col("region") == region, pl.col("status") == "completed")
            .drop_nulls("product")
            .group_by("product")
            .agg(units=pl.sum("quantity"), revenue=revenue)
            .sort("revenue", "product", descending=[True, False])
            .remote(ctx)
            .single_node()
            .sink_parquet(f"{RESULTS}/{region}.parquet")
        )
        return wait_for(query)

    cluster_id = start_cluster(CLUSTER)
    with stop_cluster(cluster_id).as_teardown(setups=cluster_id) as cluster:
        # expand() does not join the scope by itself.
        cluster.add_task(rank_products.partial(cluster_id=cluster_id).expand(region=REGIONS))


parallel_single_node()
