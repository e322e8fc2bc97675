"""
### Submit a query and detach

The task ends as soon as the cluster has accepted the query. Use it for work that nobody waits for:
refreshing a cache, a report that is read tomorrow.

A lost reply or a killed worker does not cause a second query. `detach` lets the query run on
without the task.

**What is not known then:** whether the query succeeds. The task is green once the query was
submitted; a query that fails later fails no task and no run. Look at its page in Polars Cloud, or
use `status_check`.

**What it costs:** nobody stops the cluster. Its idle timeout stops it ten minutes after the query
has ended, the minimum that Polars Cloud allows. These minutes are billed.

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
        # Not at the top: Airflow parses the file every few seconds, and importing Polars is slow.
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
            # A distributed query writes a directory of files unless it is told to write one.
            query = best_sellers.remote(ctx).sink_parquet(RESULT, sink_to_single_file=True)
            return detach(query)

    submit_best_sellers()


single_query()
