"""
### One cluster for several tasks of a run

One task starts the cluster, other tasks query it at the same time, and one task stops it. Use it
when several tasks of a run need the same cluster, and nothing needs it afterwards.

`shared_cluster` adds a setup task `start_cluster` and a teardown task `stop_cluster`. Airflow runs
the teardown when all tasks between them have ended, retries included. A failed task still fails the
run. (With `TriggerRule.ALL_DONE` on a last task instead, the run would succeed.)

**Cost:** the cluster from `start_cluster` to `stop_cluster`. No worker slot while queries
run.

**Who stops the cluster:** `stop_cluster`. Simultaneous runs share the cluster, and the last of them
stops it. Tasks that are cleared later start it again, and the last of them stops it. If a run
exceeds its `dagrun_timeout`, Airflow skips the teardown, and `clean_up` stops the cluster. If that
fails, too, the idle timeout stops it after ten minutes.

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
        # Not at the top: Airflow parses this file every few seconds, and importing Polars is slow.
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
            # Without sink_to_single_file, a distributed query writes a directory of files.
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
