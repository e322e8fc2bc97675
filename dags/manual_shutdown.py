"""
### A cluster for some of a run's tasks

One task starts the cluster, others query it at the same time, one stops it. Use it when several
tasks share a cluster that is needed for this run alone.

`shared_cluster` makes a setup `start_cluster` and a teardown `stop_cluster`. The teardown begins
when all tasks between them have ended, retries included. A failed task still fails the run. (With a
last task of `TriggerRule.ALL_DONE` instead, the run would succeed.) A run that exceeds its
`dagrun_timeout` skips the teardown; `clean_up` then stops the cluster.

The tasks find the cluster by its name. Simultaneous runs share it, and the last of them stops it.
Tasks that are cleared later start it again, and the last of them stops it.

**What it costs:** the cluster from `start_cluster` to `stop_cluster`. If nobody stops it, its idle
timeout does after ten minutes. No worker slot while queries run.

**Copy along:** the folders `include/` and `plugins/polars_remote/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag

from include.auth import authenticate
from include.shop import DATA, check_data_location, scan
from polars_remote import Query, clean_up, query_task, shared_cluster, use_cluster

BEST_CUSTOMERS = f"{DATA}/results/manual_shutdown/best_customers.parquet"
EMPTY_SHELVES = f"{DATA}/results/manual_shutdown/empty_shelves.parquet"
CLUSTER = {"name": "airflow-manual-shutdown", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}


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
def manual_shutdown() -> None:
    @query_task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def find_best_customers() -> Query:
        # Not at the top: Airflow parses the file every few seconds, and importing Polars is slow.
        import polars as pl

        best = (
            scan("sales")
            .filter(pl.col("status") == "completed", pl.col("customer_id").is_not_null())
            .group_by("customer_id")
            .agg(spent=(pl.col("quantity") * pl.col("unit_price")).sum())
            .sort("spent", "customer_id", descending=[True, False])
            .head(100)
        )
        # Starts the cluster if it has stopped, for example if only this task was cleared.
        with use_cluster(CLUSTER) as ctx:
            # A distributed query writes a directory of files unless it is told to write one.
            return best.remote(ctx).sink_parquet(BEST_CUSTOMERS, sink_to_single_file=True)

    @query_task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def find_empty_shelves() -> Query:
        import polars as pl

        empty = (
            scan("inventory")
            .group_by("region", "product")
            .agg(lowest=pl.min("on_hand"), mean=pl.mean("on_hand"))
            .sort("lowest", "region", "product")
            .head(100)
        )
        with use_cluster(CLUSTER) as ctx:
            return empty.remote(ctx).sink_parquet(EMPTY_SHELVES, sink_to_single_file=True)

    with shared_cluster(CLUSTER, check=check_data_location):
        find_best_customers()
        find_empty_shelves()


manual_shutdown()
