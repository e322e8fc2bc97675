"""
### The daily report: sales, inventory, returns

All patterns together. A manifest registered from code; its cluster, started once; three
transformations in parallel, a single node each; their locations handed to the report; the cluster
stopped whatever happens, and the run failed if a query failed.

The report is one file per day, for the run's own date: the day that has just ended on schedule, or
today when triggered by hand. Running a day again replaces exactly that day's report.

The manifest is this DAG's own, and so is its cluster: with `MAX_ACTIVE_RUNS = 1` no other run can
be using it when it is stopped.

**What it costs:** three nodes from `start_cluster` to `stop_cluster`.

**Copy along:** all of `include/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import CronDataIntervalTimetable, dag, task

from include.auth import authenticate
from include.clusters import start_cluster, stop_cluster
from include.manifests import ensure_manifest
from include.queries import wait_for
from include.run_date import get_run_date
from include.settings import DATA, MANIFEST, WORKSPACE

STAGES = f"{DATA}/stages/complete_pipeline"
REPORTS = f"{DATA}/reports/daily"
REPORT_MANIFEST = f"{MANIFEST}-complete-pipeline"
CLUSTER = {"cpus": 2, "memory": 4, "cluster_size": 3, "idle_timeout_mins": 10}
MAX_ACTIVE_RUNS = 1


@dag(
    schedule=CronDataIntervalTimetable("@daily", timezone="UTC"),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=MAX_ACTIVE_RUNS,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def complete_pipeline() -> None:
    @task
    @authenticate
    def register_manifest() -> str:
        ensure_manifest(REPORT_MANIFEST, **CLUSTER)
        return REPORT_MANIFEST

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def transform_sales(cluster_id: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        day = get_run_date()
        query = (
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
            .remote(ctx)
            .single_node()
            .sink_parquet(f"{STAGES}/{day}/sales.parquet")
        )
        return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def transform_inventory(cluster_id: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        day = get_run_date()
        query = (
            pl.scan_parquet(f"{DATA}/inventory/")
            .filter(pl.col("date") == day)
            .group_by("category", "product")
            .agg(
                on_hand=pl.sum("on_hand"),
                stock_value=(pl.col("on_hand") * pl.col("unit_cost")).sum(),
            )
            .remote(ctx)
            .single_node()
            .sink_parquet(f"{STAGES}/{day}/inventory.parquet")
        )
        return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def transform_returns(cluster_id: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        day = get_run_date()
        query = (
            pl.scan_parquet(f"{DATA}/returns/")
            .filter(pl.col("date") == day)
            .group_by("product")
            .agg(returned=pl.sum("quantity"), refunded=pl.sum("refund"))
            .remote(ctx)
            .single_node()
            .sink_parquet(f"{STAGES}/{day}/returns.parquet")
        )
        return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def build_report(
        cluster_id: str, sales: list[str], inventory: list[str], returns: list[str]
    ) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        day = get_run_date()
        query = (
            pl.scan_parquet(inventory)
            .join(pl.scan_parquet(sales), on="product", how="left")
            .join(pl.scan_parquet(returns), on="product", how="left")
            .with_columns(pl.col("orders", "units", "revenue", "returned", "refunded").fill_null(0))
            .select(pl.lit(day).alias("date"), pl.all())
            .sort("category", "product")
            .remote(ctx)
            .sink_parquet(f"{REPORTS}/{day}.parquet", sink_to_single_file=True)
        )
        return wait_for(query)

    cluster_id = start_cluster({"name": register_manifest()})
    with stop_cluster(cluster_id).as_teardown(setups=cluster_id):
        build_report(
            cluster_id,
            sales=transform_sales(cluster_id),
            inventory=transform_inventory(cluster_id),
            returns=transform_returns(cluster_id),
        )


complete_pipeline()
