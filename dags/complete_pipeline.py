"""
### The daily report: sales, inventory, returns

All patterns together. A manifest registered from code, and its cluster, started once; three
transformations in parallel, a single node each; their locations handed to the report; the cluster
stopped whatever happens, and the run failed if a query failed.

The report is one file per day, for the run's own date: the day that has just ended on schedule, or
today when triggered by hand. Running a day again replaces exactly that day's report.

Runs at the same time, for several days say, share the cluster; the last of them stops it.

**What it costs:** three nodes from `start_cluster` to `stop_cluster`.

**Copy along:** the folder `include/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import CronDataIntervalTimetable, dag, task

from include.auth import authenticate
from include.clusters import clean_up, running_cluster, start_cluster, stop_cluster
from include.queries import submit, wait_for
from include.run_date import get_run_date
from include.settings import DATA, WORKSPACE

STAGES = f"{DATA}/stages/complete_pipeline"
REPORTS = f"{DATA}/reports/daily"
MANIFEST = "airflow-complete-pipeline"
CLUSTER = {"cpus": 2, "memory": 4, "cluster_size": 3, "idle_timeout_mins": 10}


@dag(
    schedule=CronDataIntervalTimetable("@daily", timezone="UTC"),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    dagrun_timeout=timedelta(hours=2),
    on_failure_callback=clean_up,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def complete_pipeline() -> None:
    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def transform_sales(manifest: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        day = get_run_date()
        sold = (
            pl.scan_parquet(f"{DATA}/sales/")
            .filter(
                pl.col("date") == day,
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
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(sold.remote(ctx).single_node(), f"{STAGES}/{day}/sales.parquet")
            return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def transform_inventory(manifest: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        day = get_run_date()
        in_stock = (
            pl.scan_parquet(f"{DATA}/inventory/")
            .filter(pl.col("date") == day)
            .group_by("category", "product")
            .agg(
                on_hand=pl.sum("on_hand"),
                stock_value=(pl.col("on_hand") * pl.col("unit_cost")).sum(),
            )
        )
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(in_stock.remote(ctx).single_node(), f"{STAGES}/{day}/inventory.parquet")
            return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def transform_returns(manifest: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        day = get_run_date()
        returned = (
            pl.scan_parquet(f"{DATA}/returns/")
            .filter(pl.col("date") == day)
            .group_by("product")
            .agg(returned=pl.sum("quantity"), refunded=pl.sum("refund"))
        )
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(returned.remote(ctx).single_node(), f"{STAGES}/{day}/returns.parquet")
            return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def build_report(
        manifest: str, sales: list[str], inventory: list[str], returns: list[str]
    ) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        day = get_run_date()
        report = (
            pl.scan_parquet(inventory)
            .join(pl.scan_parquet(sales), on="product", how="left")
            .join(pl.scan_parquet(returns), on="product", how="left")
            .with_columns(pl.col("orders", "units", "revenue", "returned", "refunded").fill_null(0))
            .select(pl.lit(day).alias("date"), pl.all())
            .sort("category", "product")
        )
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(report.remote(ctx), f"{REPORTS}/{day}.parquet", sink_to_single_file=True)
            return wait_for(query)

    manifest = start_cluster(MANIFEST, CLUSTER)
    with stop_cluster(manifest).as_teardown(setups=manifest):
        build_report(
            manifest,
            sales=transform_sales(manifest),
            inventory=transform_inventory(manifest),
            returns=transform_returns(manifest),
        )


complete_pipeline()
