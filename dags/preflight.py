"""
### Look before the first run

Run it by hand, first of all: it looks for whatever would make the other DAGs fail, and fails on the
first that it finds. The log has one line per step, with what was found or what to do: Airflow,
client and Polars, the data location, the Connection, the login, the workspace, the manifest.

With the parameter `spend` it goes on with what is billed: it starts a cluster, writes a row to
`results/preflight.parquet` at the data location, reads it back, stops the cluster and sees it
stopped.

**What it costs:** nothing. With `spend`, one small node for some minutes; when the task's time is
over, the cluster is stopped, and a worker that is killed leaves it to its idle timeout.

**Copy along:** the folder `include/`.
"""

from datetime import timedelta

from airflow.sdk import Param, dag, task

from include.auth import authenticate
from include.polars_remote import clean_up
from include.preflight import check_cluster, check_setup, describe_cost

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
