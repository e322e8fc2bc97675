"""
### A cluster for one task

The first query starts the cluster, and the end of the `with` block stops it. Use it when all
queries fit in one task, one after the other or at the same time.

`use_cluster` replaces `with ctx:` of Polars Cloud. If the cluster has already stopped, `with ctx:`
raises its own error in place of the block's.

**Cost:** the cluster and a worker slot while the block runs. The cluster stops as soon as
the query has ended. With a `@query_task` it would run for some seconds more, until Airflow resumes
the task.

**Who stops the cluster:** the task, at the end of the block, whether the block succeeds, fails,
times out or is ended by a user. Simultaneous runs share the cluster, and the last of them stops it.

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
        # Not at the top: Airflow parses this file every few seconds, and importing Polars is slow.
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
            # Without sink_to_single_file, a distributed query writes a directory of files.
            query = stock.remote(ctx).sink_parquet(RESULT, sink_to_single_file=True)
            return query.await_result().location

    value_stock()


context_manager_shutdown()
