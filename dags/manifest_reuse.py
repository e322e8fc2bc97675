"""
### One cluster for all who know its name

A manifest describes a cluster under a name. The first query that comes starts the cluster, those
that follow within ten minutes find it running and start at once, whichever DAG, run or notebook
they come from. Use it for many short queries spread over the day.

The manifest is registered from here, so that the cluster's size is reviewed and rolled back like
the rest of the code. It pins the Polars and Python versions of the worker that registered it, and
is registered anew after either was upgraded.

**What it costs:** the cluster from the first query until ten minutes after the last. No task stops
it: another may be using it.

**Copy along:** the folder `include/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.auth import authenticate
from include.clusters import clean_up
from include.manifests import ensure_manifest
from include.queries import submit, wait_for
from include.settings import DATA, MANIFEST, WORKSPACE

RETURNS = f"{DATA}/returns/"
RESULT = f"{DATA}/results/manifest_reuse.parquet"
CLUSTER = {"cpus": 2, "memory": 4, "cluster_size": 2, "idle_timeout_mins": 10}


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    on_failure_callback=clean_up,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["polars-cloud", "shop"],
    doc_md=__doc__,
)
def manifest_reuse() -> None:
    @task
    @authenticate
    def register_manifest() -> str:
        ensure_manifest(MANIFEST, **CLUSTER)
        return MANIFEST

    @task(execution_timeout=timedelta(minutes=30))
    @authenticate
    def sum_refunds(manifest: str) -> list[str]:
        import polars as pl
        import polars_cloud as pc

        ctx = pc.ComputeContext(workspace=WORKSPACE, name=manifest)
        refunds = (
            pl.scan_parquet(RETURNS)
            .group_by("reason")
            .agg(returns=pl.len(), units=pl.sum("quantity"), refund=pl.sum("refund"))
            .sort("refund", descending=True)
        )
        query = submit(refunds.remote(ctx), RESULT, sink_to_single_file=True)
        return wait_for(query)

    sum_refunds(register_manifest())


manifest_reuse()
