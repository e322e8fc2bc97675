"""
### Multi-stage pipeline: pass URIs, not data

Each stage returns the location of its result, and the next stage scans that location. Only the URIs
pass through Airflow, never the data. Use it when a stage is worth checking or retrying on its own:
a stage that fails is retried from the result of the previous stage.

Results between stages are temporary: `execute` writes them to Polars Cloud's own storage, which
deletes them after some hours. Only the last stage writes to a destination of its own. If a stage is
cleared after its input was deleted, it fails, and its error names the task to clear first.

**Cost:** the cluster from the first stage to the last. No worker slot while a stage runs.

**Who stops the cluster:** `stop_cluster`, as in `manual_shutdown`.

**Copy along:** the folders `include/` and `plugins/polars_remote/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag

from include.auth import authenticate
from include.shop import DATA, check_data_location, scan
from polars_remote import Query, clean_up, query_task, shared_cluster, use_cluster

RESULT = f"{DATA}/results/multi_stage.parquet"
CLUSTER = {
    "name": "airflow-multi-stage",
    "cpus": 2,
    "memory": 4,
    "cluster_size": 2,
    "idle_timeout_mins": 10,
}


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
def multi_stage() -> None:
    @query_task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def clean_sales() -> Query:
        # Not at the top: Airflow parses this file every few seconds, and importing Polars is slow.
        import polars as pl

        sales = (
            scan("sales")
            .filter(
                pl.col("product").is_not_null(),
                pl.col("quantity") > 0,
                pl.col("status").is_in(["completed", "cancelled", "pending"]),
            )
            .unique(["order_id", "line"])
            .with_columns(pl.col("region").str.strip_chars().str.to_titlecase())
        )
        # Starts the cluster if it has stopped, for example if only this task was cleared.
        with use_cluster(CLUSTER) as ctx:
            return sales.remote(ctx).distributed().execute(blocking=False)

    @query_task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def sum_days(clean_sales: list[str]) -> Query:
        import polars as pl

        sums = (
            pl.scan_parquet(clean_sales)
            .filter(pl.col("status") == "completed")
            .group_by("region", "date")
            .agg(
                orders=pl.n_unique("order_id"),
                revenue=(pl.col("quantity") * pl.col("unit_price")).sum(),
            )
        )
        with use_cluster(CLUSTER) as ctx:
            return sums.remote(ctx).execute(blocking=False)

    @query_task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def find_best_days(days: list[str]) -> Query:
        import polars as pl

        best = (
            pl.scan_parquet(days)
            .sort("revenue", "date", descending=[True, False])
            .group_by("region", maintain_order=True)
            .head(3)
            .sort("region", maintain_order=True)
        )
        with use_cluster(CLUSTER) as ctx:
            # Without sink_to_single_file, a distributed query writes a directory of files.
            return best.remote(ctx).sink_parquet(RESULT, sink_to_single_file=True)

    with shared_cluster(CLUSTER, check=check_data_location):
        find_best_days(sum_days(clean_sales()))


multi_stage()
