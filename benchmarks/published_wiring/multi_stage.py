"""Published: the first stages `execute`, and pass the locations of temporary results by XCom.

Section "Multi-stage pipelines" of https://docs.pola.rs/polars-cloud/integrations/airflow/, with the
queries of `dags/multi_stage.py`. The last stage does not wait for its query, and no task stops the
cluster. The manifest is registered once, outside the DAG. Corrected: `execute` waits already, and
its result has no `await_result`.
"""

from datetime import datetime

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA, MANIFEST
from polars_remote.settings import WORKSPACE


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def published_multi_stage() -> None:
    @task
    @authenticate
    def clean_sales() -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        result = (
            pl.scan_parquet(f"{DATA}/sales/")
            .filter(
                pl.col("product").is_not_null(),
                pl.col("quantity") > 0,
                pl.col("status").is_in(["completed", "cancelled", "pending"]),
            )
            .unique(["order_id", "line"])
            .with_columns(pl.col("region").str.strip_chars().str.to_titlecase())
            .remote(ctx)
            .execute()
        )
        if result.location is None:
            raise ValueError("The query names no location of its result")
        return result.location

    @task
    @authenticate
    def sum_days(clean_sales: list[str]) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        result = (
            pl.scan_parquet(clean_sales)
            .filter(pl.col("status") == "completed")
            .group_by("region", "date")
            .agg(
                orders=pl.n_unique("order_id"),
                revenue=(pl.col("quantity") * pl.col("unit_price")).sum(),
            )
            .remote(ctx)
            .execute()
        )
        if result.location is None:
            raise ValueError("The query names no location of its result")
        return result.location

    @task
    @authenticate
    def find_best_days(days: list[str]) -> None:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        (
            pl.scan_parquet(days)
            .sort("revenue", "date", descending=[True, False])
            .group_by("region", maintain_order=True)
            .head(3)
            .sort("region", maintain_order=True)
            .remote(ctx)
            .sink_parquet(f"{DATA}/published/multi_stage/")
        )

    find_best_days(sum_days(clean_sales()))


published_multi_stage()
