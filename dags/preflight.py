"""
### Check the setup before the first run

Run it by hand, before all other DAGs. It fails at the first problem that would make them fail. The
log has one line per step, with its result or with advice: Airflow, client and Polars, the data
location, the tables' types, the Connection, the login, the workspace, the manifest. The types are
checked only if this worker may read the files.

With the parameter `spend`, a billed check follows: it starts a cluster, writes a row to
`results/preflight.parquet` at the data location, reads it back, checks the tables' types, and stops
the cluster.

**Cost:** nothing. With `spend`, one small node for a few minutes.

**Who stops the cluster:** the task, also if it fails or times out. If its worker is killed, the
idle timeout stops the cluster.

**Copy along:** the folders `include/` and `plugins/polars_remote/`.
"""

from datetime import timedelta

from airflow.sdk import Param, dag, task

from include.auth import authenticate
from include.preflight import check_cluster, check_setup, describe_cost
from polars_remote import clean_up

CLUSTER = {"name": "airflow-preflight", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}
LIMIT = timedelta(minutes=20)
COST = describe_cost(CLUSTER, LIMIT)


@dag(
    schedule=None,
    on_failure_callback=clean_up,
    on_success_callback=clean_up,
    params={"spend": Param(False, type="boolean", title="Start a cluster", description=COST)},
    tags=["polars-cloud"],
    doc_md=__doc__,
)
def preflight() -> None:
    # Without @authenticate: the login is one of the steps.
    @task(execution_timeout=timedelta(minutes=10))
    def check_settings() -> None:
        check_setup()

    @task.run_if(
        lambda context: context["params"]["spend"],
        f"Nothing was started, and nothing is billed. With the parameter spend, {COST}",
    )
    @task(execution_timeout=LIMIT)
    @authenticate
    def try_cluster() -> None:
        check_cluster(CLUSTER, LIMIT)

    check_settings() >> try_cluster()


preflight()
