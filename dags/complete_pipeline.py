"""
### The daily report: sales, inventory, returns

All patterns in one DAG. `start_cluster` registers the manifest and starts the cluster. Three
transformations run in parallel, each on a single node, and pass the locations of their results to
`build_report`. A failed query fails the run.

There is one report file per day. A scheduled run reports on the day that has just ended, a manual
run on today. Running a day again replaces only that day's report. An event of the Asset
`daily_report` gives other DAGs the report's date, rows and location. `stop_cluster` logs and
returns what the cluster cost, and emits an event of the Asset `daily_report_cost`.

**Cost:** three nodes from `start_cluster` to `stop_cluster`. No worker slot while a query
runs or the cluster starts.

**Who stops the cluster:** `stop_cluster`, after success and after a failure. Simultaneous runs,
such as a backfill, share the cluster, and the last of them stops it.

**Copy along:** the folders `include/` and `plugins/polars_remote/`.
"""

from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import Asset, dag
from airflow.timetables.interval import CronDataIntervalTimetable

from include.auth import authenticate
from include.shop import DATA, check_data_location, scan
from polars_remote import Query, clean_up, query_task, shared_cluster, use_cluster

REPORTS = f"{DATA}/reports/daily"
REPORT = Asset("daily_report", uri=REPORTS)
COST = Asset("daily_report_cost")
# A manual run may have no logical date. Every run has a `run_after`.
DAY = "{{ (dag_run.logical_date or dag_run.run_after) | ds }}"
CLUSTER = {
    "name": "airflow-complete-pipeline",
    "cpus": 2,
    "memory": 4,
    "cluster_size": 3,
    "idle_timeout_mins": 10,
}


@dag(
    schedule=CronDataIntervalTimetable("@daily", timezone="UTC"),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    dagrun_timeout=timedelta(hours=2),
    on_failure_callback=clean_up,
    on_success_callback=clean_up,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def complete_pipeline() -> None:
    @query_task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def transform_sales(day: str) -> Query:
        # Not at the top: Airflow parses this file every few seconds, and importing Polars is slow.
        import polars as pl

        sold = (
            scan("sales")
            .filter(
                pl.col("date") == pl.lit(day).str.to_date(),
                pl.col("status") == "completed",
                pl.col("product").is_not_null(),
                pl.col("quantity") > 0,
            )
            .unique(["order_id", "line"])
            .group_by("product")
            .agg(
                orders=pl.n_unique("order_id"),
                units=pl.sum("quantity"),
                revenue=(pl.col("quantity") * pl.col("unit_price")).sum(),
            )
        )
        # Starts the cluster if it has stopped, for example if only this task was cleared.
        with use_cluster(CLUSTER) as ctx:
            return sold.remote(ctx).single_node().execute(blocking=False)

    @query_task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def transform_inventory(day: str) -> Query:
        import polars as pl

        in_stock = (
            scan("inventory")
            .filter(pl.col("date") == pl.lit(day).str.to_date())
            .group_by("category", "product")
            .agg(
                on_hand=pl.sum("on_hand"),
                stock_value=(pl.col("on_hand") * pl.col("unit_cost")).sum(),
            )
        )
        with use_cluster(CLUSTER) as ctx:
            return in_stock.remote(ctx).single_node().execute(blocking=False)

    @query_task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def transform_returns(day: str) -> Query:
        import polars as pl

        returned = (
            scan("returns")
            .filter(pl.col("date") == pl.lit(day).str.to_date())
            .group_by("product")
            .agg(returned=pl.sum("quantity"), refunded=pl.sum("refund"))
        )
        with use_cluster(CLUSTER) as ctx:
            return returned.remote(ctx).single_node().execute(blocking=False)

    @query_task(execution_timeout=timedelta(minutes=30), outlets=[REPORT])
    @authenticate
    def build_report(
        day: str, sales: list[str], inventory: list[str], returns: list[str], *, outlet_events: Any
    ) -> Query:
        import polars as pl

        report = (
            pl.scan_parquet(inventory)
            .join(pl.scan_parquet(sales), on="product", how="left")
            .join(pl.scan_parquet(returns), on="product", how="left")
            .with_columns(pl.col("orders", "units", "revenue", "returned", "refunded").fill_null(0))
            .select(pl.lit(day).str.to_date().alias("date"), pl.all())
            .sort("category", "product")
        )
        uri = f"{REPORTS}/{day}.parquet"
        outlet_events[REPORT].extra = {"date": day}  # the library adds rows and location
        with use_cluster(CLUSTER) as ctx:
            # Without sink_to_single_file, a distributed query writes a directory of files.
            return report.remote(ctx).sink_parquet(uri, sink_to_single_file=True)

    with shared_cluster(CLUSTER, check=check_data_location, cost=COST):
        build_report(
            DAY,
            sales=transform_sales(DAY),
            inventory=transform_inventory(DAY),
            returns=transform_returns(DAY),
        )


complete_pipeline()
