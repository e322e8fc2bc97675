"""
### A cluster for some of a run's tasks

One task starts the cluster, others query it at the same time, one stops it. Use it when several
tasks share a cluster that is needed for this run alone.

`start_cluster` is a setup and `stop_cluster` a teardown: stopping begins when every task between
them has ended, retries included, whether they succeeded or not, and a task that failed still fails
the run. (A last task with `TriggerRule.ALL_DONE` in its place would turn such a run green.) A run
that exceeds its `dagrun_timeout` skips the teardown: `clean_up` stands in for it.

The tasks find the cluster by the name of its manifest. Runs at the same time share it, and the last
of them stops it; a task that is cleared after that starts a cluster, and stops it, for itself.

**What it costs:** the cluster from `start_cluster` to `stop_cluster`. The idle timeout of ten
minutes is the last resort, should nobody be left to stop it.

**Copy along:** the folder `include/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.clusters import clean_up, running_cluster, start_cluster, stop_cluster
from include.queries import submit, wait_for
from include.settings import DATA, WORKSPACE

SALES = f"{DATA}/sales/"
INVENTORY = f"{DATA}/inventory/"
RESULTS = f"{DATA}/results/manual_shutdown"
MANIFEST = "airflow-manual-shutdown"
CLUSTER = {"cpus": 2, "memory": 4, "idle_timeout_mins": 10}


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
def manual_shutdown() -> None:
    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def find_best_customers(manifest: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        best_customers = (
            pl.scan_parquet(SALES)
            .filter(pl.col("status") == "completed", pl.col("customer_id").is_not_null())
            .group_by("customer_id")
            .agg(spent=(pl.col("quantity") * pl.col("unit_price")).sum())
            .sort("spent", "customer_id", descending=[True, False])
            .head(100)
        )
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(
                best_customers.remote(ctx),
                f"{RESULTS}/best_customers.parquet",
                sink_to_single_file=True,
            )
            return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def find_empty_shelves(manifest: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        empty_shelves = (
            pl.scan_parquet(INVENTORY)
            .group_by("region", "product")
            .agg(lowest=pl.min("on_hand"), mean=pl.mean("on_hand"))
            .sort("lowest", "region", "product")
            .head(100)
        )
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(
                empty_shelves.remote(ctx),
                f"{RESULTS}/empty_shelves.parquet",
                sink_to_single_file=True,
            )
            return wait_for(query)

    manifest = start_cluster(MANIFEST, CLUSTER)
    with stop_cluster(manifest).as_teardown(setups=manifest):
        find_best_customers(manifest)
        find_empty_shelves(manifest)


manual_shutdown()
