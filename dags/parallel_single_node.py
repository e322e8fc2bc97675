"""
### Many small queries, one node each

One mapped task per region, each with a query that runs on a single node, as many at a time as the
cluster has nodes; the others wait in the cluster's queue. Use it when each query fits on one
machine: none pays for moving data between machines, and more nodes mean more queries at a time.

The cluster is started once, before the queries, so that they do not race to start it, and stopped
after the last of them, as in `manual_shutdown`.

**What it costs:** three nodes from `start_cluster` to `stop_cluster`.

**Copy along:** the folder `include/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.clusters import clean_up, running_cluster, start_cluster, stop_cluster
from include.queries import submit, wait_for
from include.settings import DATA, WORKSPACE

SALES = f"{DATA}/sales/"
RESULTS = f"{DATA}/results/parallel_single_node"
REGIONS = ["Centre", "East", "North", "South", "West"]
MANIFEST = "airflow-parallel-single-node"
CLUSTER = {"cpus": 2, "memory": 4, "cluster_size": 3, "idle_timeout_mins": 10}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    dagrun_timeout=timedelta(hours=2),
    on_failure_callback=clean_up,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def parallel_single_node() -> None:
    @task(execution_timeout=timedelta(minutes=30), map_index_template="{{ task.op_kwargs.region }}")
    @authenticate
    def rank_products(manifest: str, region: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        revenue = (pl.col("quantity") * pl.col("unit_price")).sum()
        ranking = (
            pl.scan_parquet(SALES)
            .filter(pl.col("region") == region, pl.col("status") == "completed")
            .drop_nulls("product")
            .group_by("product")
            .agg(units=pl.sum("quantity"), revenue=revenue)
            .sort("revenue", "product", descending=[True, False])
        )
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(ranking.remote(ctx).single_node(), f"{RESULTS}/{region}.parquet")
            return wait_for(query)

    manifest = start_cluster(MANIFEST, CLUSTER)
    with stop_cluster(manifest).as_teardown(setups=manifest) as cluster:
        # expand() does not join the scope by itself.
        cluster.add_task(rank_products.partial(manifest=manifest).expand(region=REGIONS))


parallel_single_node()
