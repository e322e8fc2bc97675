"""
### End orphans

A task ends its own queries and clusters. A task that is killed at its last try leaves them behind
as orphans. A callback, the triggerer or the next user of the same cluster then ends them. Unpause
this DAG if you run no triggerer, or if DAGs lack `on_failure_callback=clean_up` and
`on_success_callback=clean_up`.

**Cost:** a task of one second every 15 minutes, and no call to Polars Cloud if there is no
orphan. This DAG needs Airflow 3.3. On older versions, a task cannot list Variables.

**Copy along:** the folder `plugins/polars_remote/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from polars_remote import clean_up


@dag(
    schedule=timedelta(minutes=15),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    tags=["polars-cloud"],
    doc_md=__doc__,
)
def end_orphans() -> None:
    # Without @authenticate: each orphan's record names its own Connection.
    @task(execution_timeout=timedelta(minutes=10))
    def clean_up_orphans() -> None:
        clean_up()

    clean_up_orphans()


end_orphans()
