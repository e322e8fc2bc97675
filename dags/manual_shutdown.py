"""
### A cluster for some of a run's tasks

One task starts the cluster, others query it at the same time, one stops it. Use it when several
tasks share a cluster that is needed for this run alone.

`start_cluster` is a setup and `stop_cluster` a teardown: stopping begins when every task between
them has ended, retries included, whether they succeeded or not, and a task that failed still fails
the run. (A last task with `TriggerRule.ALL_DONE` in its place would turn such a run green.) Only
this run knows the cluster's id, so no other run can be stopped by mistake.

**What it costs:** the cluster from `start_cluster` to `stop_cluster`. The idle timeout of ten
minutes is the last resort should the run be killed as a whole.

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
INVENTORY = f"{DATA}/inventory/"
RESULTS = f"{DATA}/results/manual_shutdown"
CLUSTER = {"cpus": 2, "memory": 4, "idle_timeout_mins": 10}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def manual_shutdown() -> None:
    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def find_best_customers(cluster_id: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        query = (
            pl.scan_parquet(SALES)
            .filter(pl.col("status") == "completed", pl.col("customer_id").is_not_null())
            .group_by("customer_id")
            .agg(spent=(pl.col("quantity") * pl.col("unit_price")).sum())
            .sort("spent", "customer_id", descending=[True, False])
            .head(100)
            .remote(ctx)
            .sink_parquet(f"{RESULTS}/best_customers.parquet", sink_to_single_file=True)
        )
        return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def find_empty_shelves(cluster_id: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        query = (
            pl.scan_parquet(INVENTORY)
            .group_by("region", "product")
            .agg(lowest=pl.min("on_hand"), mean=pl.mean("on_hand"))
            .sort("lowest", "region", "product")
            .head(100)
            .remote(ctx)
            .sink_parquet(f"{RESULTS}/empty_shelves.parquet", sink_to_single_file=True)
        )
        return wait_for(query)

    cluster_id = start_cluster(CLUSTER)
    with stop_cluster(cluster_id).as_teardown(setups=cluster_id):
        find_best_customers(cluster_id)
        find_empty_shelves(cluster_id)


manual_shutdown()
