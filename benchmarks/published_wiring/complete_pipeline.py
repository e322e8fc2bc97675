"""Published: three single-node transformations, a report, and an `ALL_DONE` shutdown after it.

Section "Complete example" of https://docs.pola.rs/polars-cloud/integrations/airflow/, with the
queries of `dags/complete_pipeline.py` for today. The shutdown is the only leaf and depends on the
report alone. The manifest is registered once, outside the DAG. Corrected: a result has a `status`,
but neither `await_result` nor `get_status`.
"""

from datetime import UTC, datetime

from airflow.sdk import TriggerRule, dag, task

from include.auth import authenticate
from include.shop import DATA, MANIFEST
from polars_remote.settings import WORKSPACE


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def published_complete_pipeline() -> None:
    @task
    @authenticate
    def transform_sales() -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        result = (
            pl.scan_parquet(f"{DATA}/sales/")
            .filter(
                pl.col("date") == datetime.now(UTC).date(),
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
            .execute()
        )
        if result.status != pc.QueryStatus.SUCCESS:
            raise ValueError(f"The query ended as {result.status}")
        if result.location is None:
            raise ValueError("The sales were not transformed")
        return result.location

    @task
    @authenticate
    def transform_inventory() -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        result = (
            pl.scan_parquet(f"{DATA}/inventory/")
            .filter(pl.col("date") == datetime.now(UTC).date())
            .group_by("category", "product")
            .agg(
                on_hand=pl.sum("on_hand"),
                stock_value=(pl.col("on_hand") * pl.col("unit_cost")).sum(),
            )
            .remote(ctx)
            .single_node()
            .execute()
        )
        if result.status != pc.QueryStatus.SUCCESS:
            raise ValueError(f"The query ended as {result.status}")
        if result.location is None:
            raise ValueError("The inventory was not transformed")
        return result.location

    @task
    @authenticate
    def transform_returns() -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        result = (
            pl.scan_parquet(f"{DATA}/returns/")
            .filter(pl.col("date") == datetime.now(UTC).date())
            .group_by("product")
            .agg(returned=pl.sum("quantity"), refunded=pl.sum("refund"))
            .remote(ctx)
            .single_node()
            .execute()
        )
        if result.status != pc.QueryStatus.SUCCESS:
            raise ValueError(f"The query ended as {result.status}")
        if result.location is None:
            raise ValueError("The returns were not transformed")
        return result.location

    @task
    @authenticate
    def build_report(sales: list[str], inventory: list[str], returns: list[str]) -> None:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        query = (
            pl.scan_parquet(inventory)
            .join(pl.scan_parquet(sales), on="product", how="left")
            .join(pl.scan_parquet(returns), on="product", how="left")
            .with_columns(pl.col("orders", "units", "revenue", "returned", "refunded").fill_null(0))
            .select(pl.lit(datetime.now(UTC).date()).alias("date"), pl.all())
            .sort("category", "product")
            .remote(ctx)
            .distributed()
            .sink_parquet(f"{DATA}/published/complete_pipeline/")
        )
        result = query.await_result()
        if result.status != pc.QueryStatus.SUCCESS:
            raise ValueError(f"The query ended as {result.status}")

    @task(trigger_rule=TriggerRule.ALL_DONE)
    @authenticate
    def shutdown_cluster() -> None:
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        ctx.stop()

    report = build_report(transform_sales(), transform_inventory(), transform_returns())
    report >> shutdown_cluster()


published_complete_pipeline()
