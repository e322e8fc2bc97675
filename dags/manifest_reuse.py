"""
### One cluster for many DAGs, found by its name

A manifest describes a cluster under a name. The first query starts the cluster. For ten minutes
after each query, the next query finds it running and starts at once, from any DAG, run or notebook.
Use it for many short queries spread over the day.

This DAG registers the manifest, so the cluster's size is reviewed and rolled back like other code.
A changed size is logged, and applied at the next start. A manifest is tied to the worker's versions
of Polars and Python: after an upgrade, the task registers it again.

**Cost:** the cluster from the first query until ten minutes after the last. No worker slot
while the cluster starts or the query runs.

**Who stops the cluster:** its idle timeout. No task stops it, because another one may be using it.

**Copy along:** the folders `include/` and `plugins/polars_remote/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA, MANIFEST, scan
from polars_remote import Query, clean_up, ensure_manifest, query_task, use_cluster

RESULT = f"{DATA}/results/manifest_reuse.parquet"
CLUSTER = {"name": MANIFEST, "cpus": 2, "memory": 4, "cluster_size": 2, "idle_timeout_mins": 10}


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
def manifest_reuse() -> None:
    @task
    @authenticate
    def register_manifest() -> None:
        ensure_manifest(CLUSTER)

    @query_task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def sum_refunds() -> Query:
        # Not at the top: Airflow parses this file every few seconds, and importing Polars is slow.
        import polars as pl

        refunds = (
            scan("returns")
            .group_by("reason")
            .agg(returns=pl.len(), units=pl.sum("quantity"), refund=pl.sum("refund"))
            .sort("refund", descending=True)
        )
        with use_cluster(CLUSTER, stop=False) as ctx:
            # Without sink_to_single_file, a distributed query writes a directory of files.
            return refunds.remote(ctx).sink_parquet(RESULT, sink_to_single_file=True)

    register_manifest() >> sum_refunds()


manifest_reuse()
