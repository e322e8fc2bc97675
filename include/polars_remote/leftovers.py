"""End what a failed run has left: its tasks can no longer do it themselves."""

from __future__ import annotations

import logging
from itertools import groupby

from airflow.configuration import conf
from airflow.sdk import Context

from . import ledger
from .airflow_internals import TASK_ENDS, get_task_states, has_supervisor
from .ledger import Owner, Value
from .login import log_in
from .outages import time_limit
from .recorded_queries import end_recorded_query
from .releases import release, release_entry

logger = logging.getLogger(__name__)

START_SECONDS = 10.0
"""Of the DAG processor's time, for parsing the file and for the last words."""


def clean_up(context: Context) -> None:
    """End what the tasks of a failed run have left: the `on_failure_callback` of a DAG.

    A run that exceeds its `dagrun_timeout` skips its teardown, and a worker that is killed at a
    task's last try leaves its query behind. Airflow may call back long after the run has failed: if
    tasks were cleared since, the run goes on, and everything is left to them.

    Airflow calls back once, in the DAG processor, and kills the call after
    `dag_file_processor_timeout`. Until then outages are borne, and the log names what is left.
    """
    if not has_supervisor():
        return  # `dag.test()` kills no task, and nobody answers for Airflow
    seconds = conf.getfloat("dag_processor", "dag_file_processor_timeout") - START_SECONDS
    with time_limit(max(seconds, START_SECONDS)):
        _clean_up(context["dag"].dag_id, context["run_id"])


def _clean_up(dag_id: str, run_id: str) -> None:
    # Queries first: a cluster on which none runs can be stopped.
    entries = [*ledger.task_entries(dag_id, run_id), *ledger.cluster_entries(dag_id, run_id)]
    # Asked after they were read: when no task is to run, only tries that have ended wrote them.
    if not get_task_states(dag_id, run_id) <= TASK_ENDS:
        logger.info("Run %s goes on: nothing to clean up yet", run_id)
        return
    for conn_id, of_connection in groupby(entries, key=lambda entry: entry[2]["conn_id"]):
        error = log_in(conn_id)
        for key, owner, value in of_connection:
            try:
                if error:
                    raise error
                end_entry(key, owner, value)
            except Exception as failure:
                logger.error(
                    "Left by %s.%s in run %s, and to be ended by hand: %s (%s)",
                    dag_id,
                    owner.task_id,
                    run_id,
                    describe_entry(value),
                    failure,
                )


def end_entry(key: str, owner: Owner, value: Value) -> None:
    """End what an entry is about, and the entry with it.

    Raises
    ------
    TimeoutError
        A query could not be canceled.
    """
    if manifest := value.get("manifest"):
        release(manifest, owner)
        return
    for destination, record in value["queries"].items():
        if not end_recorded_query(destination, record):
            raise TimeoutError(f"the query for {destination} is still running")
    ledger.erase(key)


def end_task_entry(key: str) -> None:
    """End what a task has started that was killed while it was deferred.

    Raises
    ------
    TimeoutError
        A query could not be canceled.
    """
    if (entry := ledger.get(key)) is None:
        return
    owner, value = entry
    if max(ledger.keys(ledger.task_key(owner)), default="") != key:
        logger.info("A later try has taken over: its queries are left alone")
        return
    end_entry(key, owner, value)
    for cluster in value["kept"]:
        release_entry(cluster)


def describe_entry(value: Value) -> str:
    """Name the queries or the cluster of an entry."""
    if manifest := value.get("manifest"):
        return f"the cluster of manifest {manifest}"
    return ", ".join(
        f"query {record.get('query_id', '(id unknown)')} for {destination} on cluster "
        f"{record['cluster_id']}"
        for destination, record in value["queries"].items()
    )
