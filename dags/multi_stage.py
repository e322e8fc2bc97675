"""
### Stages that hand over where their result is

Each stage writes its result and returns its location; the next stage scans that location. Only
the URIs pass through Airflow, never the data. Use it when a stage is worth keeping, checking or
retrying on its own: a stage that fails is retried from the result of the one before it.

The first stage runs distributed and writes a directory of its own for each run; the others write
one small file each. All share one cluster, as in `manual_shutdown`.

**What it costs:** the cluster from the first stage to the last, and storing what lies between
them.

**Copy along:** the folder `include/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.clusters import clean_up, running_cluster, start_cluster, stop_cluster
from include.queries import submit, wait_for
from include.run_date import get_run_date
from include.settings import DATA, WORKSPACE

SALES = f"{DATA}/sales/"
STAGES = f"{DATA}/stages/multi_stage"
RESULT = f"{DATA}/results/multi_stage.parquet"
MANIFEST = "airflow-multi-stage"
CLUSTER = {"cpus": 2, "memory": 4, "cluster_size": 2, "idle_timeout_mins": 10}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    dagrun_timeout=timedelta(hours=2),
    on_failure_callback=clean_up,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def multi_stage() -> None:
    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def clean_sales(manifest: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        sales = (
            pl.scan_parquet(SALES)
            .filter(
                pl.col("product").is_not_null(),
                pl.col("quantity") > 0,
                pl.col("status").is_in(["completed", "cancelled", "pending"]),
            )
            .unique(["order_id", "line"])
            .with_columns(pl.col("region").str.strip_chars().str.to_titlecase())
        )
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(
                sales.remote(ctx).distributed(), f"{STAGES}/{get_run_date()}/clean_sales/"
            )
            return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def sum_days(manifest: str, clean_sales: list[str]) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        sums = (
            pl.scan_parquet(clean_sales)
            .filter(pl.col("status") == "completed")
            .group_by("region", "date")
            .agg(
                orders=pl.n_unique("order_id"),
                revenue=(pl.col("quantity") * pl.col("unit_price")).sum(),
            )
        )
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(
                sums.remote(ctx),
                f"{STAGES}/{get_run_date()}/days.parquet",
                sink_to_single_file=True,
            )
            return wait_for(query)

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def find_best_days(manifest: str, days: list[str]) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        best = (
            pl.scan_parquet(days)
            .sort("revenue", "date", descending=[True, False])
            .group_by("region", maintain_order=True)
            .head(3)
            .sort("region", maintain_order=True)
        )
        with running_cluster(pc.ComputeContext(workspace=WORKSPACE, name=manifest)) as ctx:
            query = submit(best.remote(ctx), RESULT, sink_to_single_file=True)
            return wait_for(query)

    manifest = start_cluster(MANIFEST, CLUSTER)
    with stop_cluster(manifest).as_teardown(setups=manifest):
        find_best_days(manifest, sum_days(manifest, clean_sales(manifest)))


multi_stage()
