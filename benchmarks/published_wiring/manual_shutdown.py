"""Published: two queries on a manifest's cluster, and an `ALL_DONE` task after both that stops it.

Section "Manual cluster shutdown" of https://docs.pola.rs/polars-cloud/integrations/airflow/, with
the queries of `dags/manual_shutdown.py`. The page omits the bodies of the two tasks. Here they wait
as in its section "Checking query status"; otherwise the shutdown would end their queries. The
manifest is registered once, outside the DAG.
"""

from datetime import datetime

from airflow.sdk import TriggerRule, dag, task

from include.auth import authenticate
from include.shop import DATA, MANIFEST
from polars_remote.settings import WORKSPACE


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def published_manual_shutdown() -> None:
    @task
    @authenticate
    def find_best_customers() -> None:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        query = (
            pl.scan_parquet(f"{DATA}/sales/")
            .filter(pl.col("status") == "completed", pl.col("customer_id").is_not_null())
            .group_by("customer_id")
            .agg(spent=(pl.col("quantity") * pl.col("unit_price")).sum())
            .sort("spent", "customer_id", descending=[True, False])
            .head(100)
            .remote(ctx)
            .sink_parquet(f"{DATA}/published/manual_shutdown/best_customers/")
        )
        query.await_result()
        status = query.get_status()
        if status != pc.QueryStatus.SUCCESS:
            raise ValueError(f"The query ended as {status}")

    @task
    @authenticate
    def find_empty_shelves() -> None:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        query = (
            pl.scan_parquet(f"{DATA}/inventory/")
            .group_by("region", "product")
            .agg(lowest=pl.min("on_hand"), mean=pl.mean("on_hand"))
            .sort("lowest", "region", "product")
            .head(100)
            .remote(ctx)
            .sink_parquet(f"{DATA}/published/manual_shutdown/empty_shelves/")
        )
        query.await_result()
        status = query.get_status()
        if status != pc.QueryStatus.SUCCESS:
            raise ValueError(f"The query ended as {status}")

    @task(trigger_rule=TriggerRule.ALL_DONE)
    @authenticate
    def shutdown_cluster() -> None:
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        ctx.stop()

    [find_best_customers(), find_empty_shelves()] >> shutdown_cluster()


published_manual_shutdown()
