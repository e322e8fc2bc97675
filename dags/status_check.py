"""
### Wait for a query and check how it ended

The task is green only if the query has written its result. Use it when the next task or an alert
depends on that result.

`await_result` waits in the worker. If the task times out, or a user marks it failed, the task
cancels its query. A query that failed raises its own exception, for example `ColumnNotFoundError`.
A query that was canceled, or that reports no location, fails the task, too. If the worker is
killed, the next try resumes the query.

**Cost:** a worker slot while the query runs, and the cluster until ten minutes after the
query has ended. If the task only waits, use `@query_task`, as in `manifest_reuse`: it holds no
worker slot.

**Who stops the cluster:** its idle timeout. `context_manager_shutdown` stops it at once instead.

**Copy along:** the folders `include/` and `plugins/polars_remote/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA, scan
from polars_remote import clean_up, use_cluster

RESULT = f"{DATA}/results/status_check.parquet"
CLUSTER = {"name": "airflow-status-check", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}


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
def status_check() -> None:
    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def count_order_statuses() -> list[str]:
        # Not at the top: Airflow parses this file every few seconds, and importing Polars is slow.
        import polars as pl

        statuses = (
            scan("sales")
            .group_by("date", "status")
            .agg(lines=pl.len(), orders=pl.n_unique("order_id"))
            .sort("date", "status")
        )
        with use_cluster(CLUSTER, stop=False) as ctx:
            # Without sink_to_single_file, a distributed query writes a directory of files.
            query = statuses.remote(ctx).sink_parquet(RESULT, sink_to_single_file=True)
            return query.await_result().location

    count_order_statuses()


status_check()
