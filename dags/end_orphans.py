"""
### End what ended tasks have left

A task ends its own queries and clusters. One that is killed at its last try cannot: then a
callback, the triggerer or the next user of the same cluster does it. Unpause this DAG where none of
them may come soon: without a triggerer, or with DAGs that lack `on_failure_callback=clean_up` and
`on_success_callback=clean_up`.

**What it costs:** a task of a second every 15 minutes, and no call to Polars Cloud if there is
nothing to end. It needs Airflow 3.3, which lists Variables.

**Copy along:** the folder `include/`.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

from include.polars_remote import clean_up


@dag(
    schedule=timedelta(minutes=15),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    tags=["polars-cloud"],
    doc_md=__doc__,
)
def end_orphans() -> None:
    # Without @authenticate: each entry on record names its own Connection.
    @task(execution_timeout=timedelta(minutes=10))
    def end_what_is_left() -> None:
        clean_up()

    end_what_is_left()


end_orphans()
