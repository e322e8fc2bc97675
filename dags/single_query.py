"""
### Submit a query and detach

The task ends as soon as the cluster has accepted the query. Use it for work that nobody waits for,
such as refreshing a cache.

`detach` lets the query run on after the task has ended. The query is submitted only once, even if
the reply is lost. If the worker is killed before `detach`, the next try resumes the query.

**Limit:** the task does not know whether the query succeeds. It is green once the query was
submitted. A query that fails later fails no task and no run. Look at its page in Polars Cloud, or
use `status_check`.

**Cost:** the cluster until ten minutes after the query has ended. Ten minutes are the
shortest idle timeout that Polars Cloud allows, and they are billed. No worker slot while the query
runs.

**Who stops the cluster:** its idle timeout. No task stops it.

**Copy along:** the folders `include/` and `plugins/polars_remote/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA, scan
from polars_remote import detach, use_cluster

RESULT = f"{DATA}/results/single_query.parquet"
CLUSTER = {"name": "airflow-single-query", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def single_query() -> None:
    @task
    @authenticate
    def submit_best_sellers() -> str:
        # Not at the top: Airflow parses this file every few seconds, and importing Polars is slow.
        import polars as pl

        best_sellers = (
            scan("sales")
            .filter(pl.col("status") == "completed")
            .drop_nulls("product")
            .group_by("product")
            .agg(
                orders=pl.len(),
                units=pl.sum("quantity"),
                revenue=(pl.col("quantity") * pl.col("unit_price")).sum(),
            )
            .sort("revenue", descending=True)
        )
        with use_cluster(CLUSTER, stop=False) as ctx:
            # Without sink_to_single_file, a distributed query writes a directory of files.
            query = best_sellers.remote(ctx).sink_parquet(RESULT, sink_to_single_file=True)
            return detach(query)

    submit_best_sellers()


single_query()
