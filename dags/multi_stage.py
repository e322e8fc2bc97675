"""
### Stages that hand over where their result is

Each stage writes its result and returns its location; the next stage scans that location. Only
the URIs pass through Airflow, never the data. Use it when a stage is worth keeping, checking or
retrying on its own: a stage that fails is retried from the result of the one before it.

The first stage runs distributed and writes a directory of its own for each run; the others write
one small file each. All share one cluster, as in `manual_shutdown`.

**What it costs:** the cluster from the first stage to the last, and storing what lies between
them.

**Copy along:** `include/auth.py`, `include/clusters.py`, `include/queries.py`,
`include/run_date.py`, `include/settings.py`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.clusters import start_cluster, stop_cluster
from include.queries import wait_for
from include.run_date import get_run_date
from include.settings import DATA, WORKSPACE

SALES = f"{DATA}/sales/"
STAGES = f"{DATA}/stages/multi_stage"
RESULT = f"{DATA}/results/multi_stage.parquet"
CLUSTER = {"cpus": 2, "memory": 4, "cluster_size": 2, "idle_timeout_mins": 10}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def multi_stage() -> None:
    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def clean_sales(cluster_id: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        query = (
            pl.scan_parquet(SALES)
            .filter(
                pl.col("product").is_not_null(),
                pl.col("quantity") > 0,
                pl.col("status").is_in(["completed", "cancelled", "pending"]),
            )
            .unique(["order_id", "line"])
            .with_columns(pl.col("region").str.strip_chars().str.to_titlecase())
            .remote(ctx)
            .distributed()
            .sink_parquet(f"{STAGES}/{get_run_date()}/clean_sales/")
        )
        return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def sum_days(cluster_id: str, clean_sales: list[str]) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        query = (
            pl.scan_parquet(clean_sales)
            .filter(pl.col("status") == "completed")
            .group_by("region", "date")
            .agg(
                orders=pl.n_unique("order_id"),
                revenue=(pl.col("quantity") * pl.col("unit_price")).sum(),
            )
            .remote(ctx)
            .sink_parquet(f"{STAGES}/{get_run_date()}/days.parquet", sink_to_single_file=True)
        )
        return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def find_best_days(cluster_id: str, days: list[str]) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext.connect(cluster_id, workspace=WORKSPACE)
        query = (
            pl.scan_parquet(days)
            .sort("revenue", "date", descending=[True, False])
            .group_by("region", maintain_order=True)
            .head(3)
            .sort("region", maintain_order=True)
            .remote(ctx)
            .sink_parquet(RESULT, sink_to_single_file=True)
        )
        return wait_for(query)

    cluster_id = start_cluster(CLUSTER)
    with stop_cluster(cluster_id).as_teardown(setups=cluster_id):
        find_best_days(cluster_id, sum_days(cluster_id, clean_sales(cluster_id)))


multi_stage()
