"""Published: submit to a manifest's cluster without waiting; no task stops the cluster.

Section "Named manifests for reusable clusters" of
https://docs.pola.rs/polars-cloud/integrations/airflow/, with the query of
`dags/manifest_reuse.py`. The manifest is registered once, outside the DAG.
"""

from datetime import datetime

from airflow.sdk import dag, task

from include.auth import authenticate
from include.shop import DATA, MANIFEST
from polars_remote.settings import WORKSPACE


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def published_manifest_reuse() -> None:
    @task
    @authenticate
    def sum_refunds() -> None:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=MANIFEST)
        (
            pl.scan_parquet(f"{DATA}/returns/")
            .group_by("reason")
            .agg(returns=pl.len(), units=pl.sum("quantity"), refund=pl.sum("refund"))
            .sort("refund", descending=True)
            .remote(ctx)
            .sink_parquet(f"{DATA}/published/manifest_reuse/")
        )

    sum_refunds()


published_manifest_reuse()
