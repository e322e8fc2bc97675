"""
### A cluster for the length of one task

The first query starts the cluster. The end of the `with` body stops it, however the body ends:
after success, a failed query, a time-out, a user's click. Use it when all queries fit in one task,
one after the other or at once.

`use_cluster` replaces `with ctx:`, which raises its own error if the cluster has already stopped,
and so hides the error of the body. Simultaneous runs share the cluster. The last of them stops it.

**What it costs:** the cluster and a worker slot, while the body runs. In return the cluster stops
at once. A `@query_task` is resumed some seconds after its query has ended, and its cluster runs
until then.

**Copy along:** the folders `include/` and `plugins/polars_remote/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA, scan
from polars_remote import clean_up, use_cluster

RESULT = f"{DATA}/results/context_manager_shutdown.parquet"
CLUSTER = {
    "name": "airflow-context-manager-shutdown",
    "cpus": 2,
    "memory": 4,
    "idle_timeout_mins": 10,
}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    on_failure_callback=clean_up,
    on_success_callback=clean_up,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def context_manager_shutdown() -> None:
    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def value_stock() -> list[str]:
        # Not at the top: Airflow parses the file every few seconds, and importing Polars is slow.
        import polars as pl

        stock = (
            scan("inventory")
            .group_by("date", "category")
            .agg(
                units=pl.sum("on_hand"),
                value=(pl.col("on_hand") * pl.col("unit_cost")).sum(),
            )
            .sort("date", "category")
        )
        with use_cluster(CLUSTER) as ctx:
            # A distributed query writes a directory of files unless it is told to write one.
            query = stock.remote(ctx).sink_parquet(RESULT, sink_to_single_file=True)
            return query.await_result().location

    value_stock()


context_manager_shutdown()
