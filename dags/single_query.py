"""
### Submit a query and leave

The task ends as soon as the cluster has taken the query. Use it for work that nobody waits for:
refreshing a cache, a report that is read tomorrow.

`submit` takes care that a try whose worker died, or whose submission was not answered, does not end
in a second query; `leave` ends the watch.

**What is not known then:** whether the query succeeds. The task is green once the query was
submitted; a query that fails later fails no task and no run. Look at its page in Polars Cloud, or
use `status_check`.

**What it costs:** nobody stops the cluster. It stops by itself ten minutes after the query has
ended, the least that Polars Cloud allows, and these minutes are billed.

**Copy along:** the folder `include/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.queries import leave, submit
from include.settings import DATA, WORKSPACE

SALES = f"{DATA}/sales/"
RESULT = f"{DATA}/results/single_query.parquet"
CLUSTER = {"cpus": 2, "memory": 4, "idle_timeout_mins": 10}


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
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, **CLUSTER)
        best_sellers = (
            pl.scan_parquet(SALES)
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
        query = submit(best_sellers.remote(ctx), RESULT, sink_to_single_file=True)
        return leave(query)

    submit_best_sellers()


single_query()
