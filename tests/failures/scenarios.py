"""What goes wrong, and how each DAG is to come out of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import boto3
import polars as pl

from tests.emulator.raw_calls import CLUSTER, WORKSPACE, rest_client
from tests.failures.deployment import DAG_PROCESSOR, SCHEDULER, Deployment, Run

BUCKET = "your-bucket"
LONG = 100.0
"""Seconds that a long query takes on the emulator's clock; less than a token lives."""
IDLE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Expected:
    """How a run ends.

    Attributes
    ----------
    run
        Its state.
    submits, cancels
        How many queries it submitted, and how often one was canceled.
    failed
        Tasks that end as failed.
    tries
        How often the task was tried that was tried most.
    cause
        Regular expression for what the tasks' logs tell.
    queries_left
        Queries that still run when the run has ended.
    clusters_left
        Clusters that still run then, until their idle timeout.
    """

    run: str
    submits: int
    cancels: int = 0
    failed: frozenset[str] = frozenset()
    tries: int = 1
    cause: str = ""
    queries_left: int = 0
    clusters_left: int = 0


@dataclass(frozen=True)
class Scenario:
    """One thing that goes wrong.

    Attributes
    ----------
    act
        Makes it happen to a run of the DAG, and gives that run, ended.
    expected
        By DAG.
    """

    act: Callable[[Deployment, str], Run]
    expected: Mapping[str, Expected] = field(default_factory=dict)


Fault = dict[str, Any]


def fault(operation: str, kind: str, **fields: object) -> Fault:
    return {"operation": operation, "kind": kind, **fields}


def always(operation: str, kind: str, **fields: object) -> Fault:
    return fault(operation, kind, times=1_000, **fields)


def meet(*faults: Fault) -> Callable[[Deployment, str], Run]:
    """A run that meets these faults."""

    def act(airflow: Deployment, dag_id: str) -> Run:
        for each in faults:
            airflow.emulator.api.add_fault(**each)
        run = airflow.trigger(dag_id)
        run.wait_for_end()
        return run

    return act


def with_running_queries(
    count: Mapping[str, int], then: Callable[[Deployment, Run], None], *, takes: float | None = None
) -> Callable[[Deployment, str], Run]:
    """A run to whose queries something happens while they are running.

    Parameters
    ----------
    count
        How many of them run at the same time, by DAG; one unless given.
    takes
        Seconds that they take; for ever if None.
    """

    def act(airflow: Deployment, dag_id: str) -> Run:
        emulator = airflow.emulator
        wanted = count.get(dag_id, 1)
        kind = (
            {"kind": "query_hangs"} if takes is None else {"kind": "query_takes", "seconds": takes}
        )
        emulator.api.add_fault("SubmitQuery", times=wanted, **kind)
        run = airflow.trigger(dag_id)
        airflow.eventually(lambda: len(emulator.running_queries()) == wanted)
        then(airflow, run)
        run.wait_for_end()
        return run

    return act


def cancel_from_elsewhere(airflow: Deployment, run: Run) -> None:
    [query] = airflow.emulator.running_queries()
    with rest_client(airflow.emulator.api.environment) as rest:
        rest.post(f"{WORKSPACE}/query/{query['id']}/cancel").raise_for_status()


def mark_task_failed(airflow: Deployment, run: Run) -> None:
    """Mark one task failed, and let the queries of others end."""
    emulator = airflow.emulator
    run.mark("failed", run.running_tasks()[0])
    airflow.eventually(lambda: any(query["cancels"] for query in emulator.queries()))
    airflow.eventually(lambda: {q["status"] for q in emulator.running_queries()} <= {"InProgress"})
    emulator.api.advance_clock(timedelta(seconds=LONG))


def mark_run_failed(airflow: Deployment, run: Run) -> None:
    run.mark("failed")


def clear_task(airflow: Deployment, run: Run) -> None:
    task_id = run.running_tasks()[0]
    tries = run.tries(task_id)
    run.clear(task_id)
    airflow.eventually(lambda: run.tries(task_id) > tries)


def kill_worker(airflow: Deployment, run: Run) -> None:
    """SIGKILL for the process that runs the task, then time for the query to end."""
    task_id = run.running_tasks()[0]
    tries = run.tries(task_id)
    run.process(task_id).kill()
    airflow.eventually(lambda: run.tries(task_id) > tries)
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def kill_worker_at_every_try(airflow: Deployment, run: Run) -> None:
    [task_id] = run.running_tasks()
    run.process(task_id).kill()
    airflow.eventually(lambda: run.tries(task_id) == 2 and run.running_tasks())
    airflow.eventually(lambda: "Going on with query" in run.log(task_id, "2"))
    run.process(task_id).kill()


def restart_scheduler(airflow: Deployment, run: Run) -> None:
    with airflow.without(SCHEDULER):
        pass
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def restart_polars_cloud(airflow: Deployment, run: Run) -> None:
    airflow.emulator.stop()
    airflow.emulator.start()


def break_data(airflow: Deployment, table: str, column: str) -> pl.DataFrame:
    """Take a column out of a table; what was there."""
    folder = f"s3://{BUCKET}/{table}/"
    options = storage_options(airflow)
    whole = pl.read_parquet(folder, storage_options=options)
    replace(airflow, table, whole.drop(column))
    return whole


def replace(airflow: Deployment, table: str, frame: pl.DataFrame) -> None:
    options = storage_options(airflow)
    s3 = boto3.client(
        "s3",
        endpoint_url=options["aws_endpoint_url"],
        aws_access_key_id=options["aws_access_key_id"],
        aws_secret_access_key=options["aws_secret_access_key"],
        region_name=options["aws_region"],
    )
    for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{table}/")["Contents"]:
        s3.delete_object(Bucket=BUCKET, Key=entry["Key"])
    frame.write_parquet(f"s3://{BUCKET}/{table}/all.parquet", storage_options=options)


def storage_options(airflow: Deployment) -> dict[str, str]:
    environment = airflow.emulator.api.environment
    return {name.lower(): environment[name] for name in environment if name.startswith("AWS_")}


def fail_one_of_three(airflow: Deployment, dag_id: str) -> Run:
    break_data(airflow, "returns", "quantity")
    return meet()(airflow, dag_id)


def fail_once(airflow: Deployment, dag_id: str) -> Run:
    """A run that failed for a reason that is gone."""
    whole = break_data(airflow, "sales", "status")
    run = meet()(airflow, dag_id)
    assert run.state == "failed"
    assert not airflow.emulator.live_clusters()
    replace(airflow, "sales", whole)
    return run


def clear_before_the_callback(airflow: Deployment, dag_id: str) -> Run:
    emulator = airflow.emulator
    with airflow.without(DAG_PROCESSOR):
        run = fail_once(airflow, dag_id)
        emulator.api.add_fault("SubmitQuery", "query_takes", seconds=LONG)
        run.clear(only_failed=True)
        airflow.eventually(emulator.running_queries)
    airflow.eventually(lambda: f"Run {run.run_id} goes on" in airflow.callback_log(dag_id))
    emulator.api.advance_clock(timedelta(seconds=LONG))
    run.wait_for_end()
    return run


def clear_only_failed(airflow: Deployment, dag_id: str) -> Run:
    run = fail_once(airflow, dag_id)
    run.clear(only_failed=True)
    airflow.eventually(lambda: run.state != "failed")
    run.wait_for_end()
    return run


def outdated_manifest(**drift: object) -> Callable[[Deployment, str], Run]:
    def act(airflow: Deployment, dag_id: str) -> Run:
        with rest_client(airflow.emulator.api.environment) as rest:
            name = {"manual_shutdown": "airflow-manual-shutdown"}.get(dag_id, "airflow-production")
            manifest = {**CLUSTER, **drift, "name": name}
            rest.post(f"{WORKSPACE}/manifest", json=manifest).raise_for_status()
        return meet()(airflow, dag_id)

    return act


def beside(suffix: str = "") -> Callable[[Deployment, str], Run]:
    """A run that ends while another, of the same or another DAG, uses the same cluster."""

    def act(airflow: Deployment, dag_id: str) -> Run:
        emulator = airflow.emulator
        emulator.api.add_fault("SubmitQuery", "query_takes", seconds=LONG)
        first = airflow.trigger(dag_id)
        airflow.eventually(lambda: len(emulator.running_queries()) == 1)
        second = airflow.trigger(dag_id + suffix)
        second.wait_for_end()
        assert second.state == "success"
        assert len(emulator.running_queries()) == 1, "the first run's query was stopped"
        emulator.api.advance_clock(timedelta(seconds=LONG))
        first.wait_for_end()
        return first

    return act


def failing(*tasks: str, tries: int = 2, **fields: Any) -> Expected:
    """A failed run: of tasks that were tried again, which the DAGs do once here."""
    return Expected("failed", failed=frozenset(tasks), tries=tries, **fields)


CANCELED = "Canceled query|was canceled"
"""By the task that was killed, or by the failed run's callback if that is faster."""

STATUS, CONTEXT, MANUAL = "count_order_statuses", "value_stock", "find_best_customers"
SHELVES, REFUNDS = "find_empty_shelves", "sum_refunds"

OUT_OF_ORDER: Mapping[str, tuple[Fault, ...]] = {
    "while_starting": tuple(
        fault(operation, kind, **fields)
        for operation in ("POST compute/start", "POST manifest/start")
        for kind, fields in (
            ("http_error", {"status": 429}),
            ("http_error", {"status": 500}),
            ("http_error", {"status": 503}),
            ("connection_reset", {}),
        )
    ),
    "while_submitting": (
        fault("SubmitQuery", "grpc_error", code="RESOURCE_EXHAUSTED", message="429"),
        fault("SubmitQuery", "grpc_error", code="INTERNAL", message="500"),
        fault("SubmitQuery", "grpc_error", code="UNAVAILABLE", message="503"),
        fault("SubmitQuery", "connection_reset"),
    ),
    "while_polling": (
        fault("GetQueryStatus", "grpc_error", code="RESOURCE_EXHAUSTED", message="429"),
        fault("GetQueryStatus", "grpc_error", code="INTERNAL", message="500"),
        fault("GetQueryStatus", "grpc_error", code="UNAVAILABLE", message="503"),
        fault("GetQueryStatus", "connection_reset"),
    ),
}

SCENARIOS: Mapping[str, Scenario] = {
    "a query fails": Scenario(
        meet(always("SubmitQuery", "query_fails", error="SchemaError: no such type")),
        {
            "status_check": failing(STATUS, submits=2, clusters_left=1, cause="no such type"),
            "context_manager_shutdown": failing(CONTEXT, submits=2, cause="no such type"),
            "manifest_reuse": failing(REFUNDS, submits=2, clusters_left=1, cause="no such type"),
            "manual_shutdown": failing(MANUAL, SHELVES, submits=4, cause="no such type"),
            "parallel_single_node": failing(
                *(f"rank_products[{n}]" for n in range(5)), submits=10, cause="no such type"
            ),
            "multi_stage": failing("clean_sales", submits=2, cause="no such type"),
            "complete_pipeline": failing(
                *("transform_sales", "transform_inventory", "transform_returns"),
                submits=6,
                cause="no such type",
            ),
        },
    ),
    "one of three siblings fails while the others run": Scenario(
        fail_one_of_three,
        {
            "complete_pipeline": failing(
                "transform_returns", submits=4, cause="ColumnNotFoundError.*quantity"
            )
        },
    ),
    "a query is canceled from elsewhere": Scenario(
        with_running_queries({}, cancel_from_elsewhere),
        {
            "status_check": failing(
                STATUS, tries=1, submits=1, cancels=1, clusters_left=1, cause="was canceled"
            ),
            "context_manager_shutdown": failing(
                CONTEXT, tries=1, submits=1, cancels=1, cause="was canceled"
            ),
        },
    ),
    "a query outlasts the task's execution_timeout": Scenario(
        meet(always("SubmitQuery", "query_hangs")),
        {
            "status_check_out_of_time": failing(
                STATUS, submits=2, cancels=2, clusters_left=1, cause="Process timed out"
            ),
            "context_manager_shutdown_out_of_time": failing(
                CONTEXT, submits=2, cancels=2, cause="Process timed out"
            ),
            "manual_shutdown_out_of_time": failing(
                MANUAL, SHELVES, submits=4, cancels=4, cause="Process timed out"
            ),
        },
    ),
    "a query outlasts the run's dagrun_timeout": Scenario(
        meet(always("SubmitQuery", "query_hangs")),
        {
            "manual_shutdown_run_out_of_time": Expected(
                "failed", submits=2, cancels=2, cause=CANCELED
            )
        },
    ),
    "a user marks the task failed": Scenario(
        with_running_queries({"manual_shutdown": 2}, mark_task_failed, takes=LONG),
        {
            "status_check": failing(
                STATUS, tries=1, submits=1, cancels=1, clusters_left=1, cause=CANCELED
            ),
            "context_manager_shutdown": failing(
                CONTEXT, tries=1, submits=1, cancels=1, cause=CANCELED
            ),
            "manual_shutdown": failing(MANUAL, tries=1, submits=2, cancels=1, cause=CANCELED),
        },
    ),
    "a user clears the running task": Scenario(
        with_running_queries({}, clear_task),
        {
            "status_check": Expected(
                "success", tries=2, submits=2, cancels=1, clusters_left=1, cause=CANCELED
            ),
            "context_manager_shutdown": Expected(
                "success", tries=2, submits=2, cancels=1, cause=CANCELED
            ),
        },
    ),
    "a user marks the run failed": Scenario(
        with_running_queries({"manual_shutdown": 2}, mark_run_failed),
        {
            "status_check": failing(
                STATUS, tries=1, submits=1, cancels=1, clusters_left=1, cause=CANCELED
            ),
            "context_manager_shutdown": failing(
                CONTEXT, tries=1, submits=1, cancels=1, cause=CANCELED
            ),
            "manual_shutdown": failing(
                MANUAL, SHELVES, tries=1, submits=2, cancels=2, cause=CANCELED
            ),
        },
    ),
    "the cluster does not start": Scenario(
        meet(
            always("POST compute/start", "startup_fails", message="no machines left"),
            always("POST manifest/start", "startup_fails", message="no machines left"),
        ),
        {
            "status_check": failing(STATUS, submits=0, cause="no machines left"),
            "context_manager_shutdown": failing(CONTEXT, submits=0, cause="no machines left"),
            "manifest_reuse": failing(REFUNDS, submits=0, cause="no machines left"),
            "manual_shutdown": failing("start_cluster", submits=0, cause="no machines left"),
        },
    ),
    "the cluster is lost in mid-query": Scenario(
        meet(fault("SubmitQuery", "cluster_lost", message="the machine was reclaimed")),
        {
            "status_check": Expected(
                "success", tries=2, submits=2, clusters_left=1, cause="the machine was reclaimed"
            ),
            "context_manager_shutdown": Expected(
                "success", tries=2, submits=2, cause="the machine was reclaimed"
            ),
            "manifest_reuse": Expected(
                "success", tries=2, submits=2, clusters_left=1, cause="the machine was reclaimed"
            ),
            "multi_stage": Expected(
                "success", tries=2, submits=4, cause="the machine was reclaimed"
            ),
        },
    ),
    "the shutdown finds nothing to stop": Scenario(
        meet(fault("SubmitQuery", "cluster_lost", nth=3, message="the machine was reclaimed")),
        {"multi_stage": Expected("success", tries=2, submits=4, cause="nothing to stop")},
    ),
    "the shutdown fails": Scenario(
        meet(always("POST compute/{id}/stop", "http_error", status=500)),
        {
            "manual_shutdown": Expected(
                "success",
                tries=2,
                submits=2,
                failed=frozenset({"stop_cluster"}),
                clusters_left=1,
                cause="Status 500",
            )
        },
    ),
    **{
        f"429, 500, 503 and a reset {phase.replace('_', ' ')}": Scenario(
            meet(*faults),
            {
                "status_check": Expected(
                    "success", submits=1, clusters_left=1, cause="is out of order"
                ),
                "manual_shutdown": Expected("success", submits=2, cause="is out of order"),
            },
        )
        for phase, faults in OUT_OF_ORDER.items()
    },
    "a call that is never answered while starting": Scenario(
        meet(fault("POST manifest/start", "stall")),
        # The client gives up a request by itself, and asks again.
        {"manual_shutdown": Expected("success", submits=2, cause="Cluster .* is running")},
    ),
    "a call that is never answered while submitting": Scenario(
        meet(fault("SubmitQuery", "stall")),
        {"status_check": Expected("success", submits=1, clusters_left=1, cause="gave no answer")},
    ),
    "a call that is never answered while polling": Scenario(
        meet(fault("GetQueryStatus", "stall")),
        {"status_check": Expected("success", submits=1, clusters_left=1, cause="gave no answer")},
    ),
    "the answer to a submission is lost": Scenario(
        meet(fault("SubmitQuery", "answer_lost")),
        {
            "single_query": Expected(
                "success", submits=1, clusters_left=1, cause="taken without an answer"
            ),
            "status_check": Expected(
                "success", submits=1, clusters_left=1, cause="taken without an answer"
            ),
            "manual_shutdown": Expected("success", submits=2, cause="taken without an answer"),
        },
    ),
    "the answer to a cluster's start is lost": Scenario(
        meet(
            fault("POST manifest/start", "answer_lost"),
            fault("POST compute/start", "answer_lost"),
        ),
        {
            "manifest_reuse": Expected(
                "success", submits=1, clusters_left=1, cause="is out of order"
            ),
            "manual_shutdown": Expected("success", submits=2, cause="is out of order"),
            # Without a manifest there is no name by which to find it.
            "context_manager_shutdown": Expected(
                "success", submits=1, clusters_left=1, cause="is out of order"
            ),
        },
    ),
    "an outage outlasts the budget": Scenario(
        meet(
            fault("SubmitQuery", "query_hangs"),
            always("GetQueryStatus", "grpc_error", code="UNAVAILABLE", message="down"),
        ),
        {
            "status_check": failing(STATUS, submits=1, cancels=1, clusters_left=1, cause="down"),
            # Its cluster is stopped, so the next try has a query of its own.
            "context_manager_shutdown": failing(CONTEXT, submits=2, cancels=2, cause="down"),
        },
    ),
    "the login expires in mid-wait": Scenario(
        meet(fault("GetQueryStatus", "tokens_expire", nth=2)),
        {
            "status_check": Expected("success", submits=1, clusters_left=1, cause="is renewed"),
            "manual_shutdown": Expected("success", submits=2, cause="is renewed"),
        },
    ),
    "the credentials are revoked in mid-run": Scenario(
        meet(
            fault("SubmitQuery", "query_hangs"),
            fault("GetQueryStatus", "credentials_revoked", nth=2),
        ),
        {
            "status_check": failing(
                STATUS,
                tries=1,
                submits=1,
                queries_left=1,
                clusters_left=1,
                cause="was refused by Polars Cloud",
            )
        },
    ),
    "the manifest is missing": Scenario(
        meet(),
        {
            "manifest_reuse": Expected(
                "success", submits=1, clusters_left=1, cause="Registered manifest"
            ),
            "manual_shutdown": Expected("success", submits=2, cause="Registered manifest"),
        },
    ),
    "the manifest is for another Python": Scenario(
        outdated_manifest(python_version={"major": 3, "minor": 9, "patch": 1}),
        {"manifest_reuse": Expected("success", submits=1, clusters_left=1, cause="is out of date")},
    ),
    "the manifest is for another Polars": Scenario(
        outdated_manifest(polars_version="1.41.2"),
        {"manual_shutdown": Expected("success", submits=2, cause="is out of date")},
    ),
    "Polars Cloud restarts in mid-query": Scenario(
        with_running_queries({}, restart_polars_cloud),
        {
            "status_check": Expected(
                "success", submits=1, clusters_left=1, cause="is out of order"
            ),
            "context_manager_shutdown": Expected("success", submits=1, cause="is out of order"),
        },
    ),
    "the worker is killed after submitting": Scenario(
        with_running_queries({}, kill_worker, takes=LONG),
        {
            "status_check": Expected(
                "success", tries=2, submits=1, clusters_left=1, cause="Going on with query"
            ),
            "context_manager_shutdown": Expected(
                "success", tries=2, submits=1, cause="Going on with query"
            ),
        },
    ),
    "the worker is killed at every try": Scenario(
        with_running_queries({}, kill_worker_at_every_try),
        {
            "status_check": failing(
                STATUS, submits=1, cancels=1, clusters_left=1, cause="Process terminated by signal"
            ),
            "context_manager_shutdown": failing(
                CONTEXT, submits=1, cancels=1, cause="Process terminated by signal"
            ),
            "multi_stage": failing(
                "clean_sales", submits=1, cancels=1, cause="Process terminated by signal"
            ),
        },
    ),
    "the scheduler restarts in mid-query": Scenario(
        with_running_queries({}, restart_scheduler, takes=LONG),
        {
            "status_check": Expected(
                "success", tries=2, submits=1, clusters_left=1, cause="Going on with query"
            )
        },
    ),
    "failed tasks are cleared after the cluster was stopped": Scenario(
        clear_only_failed,
        {"manual_shutdown": Expected("success", tries=3, submits=4, cause="Cluster .* stopped")},
    ),
    "failed tasks are cleared before the run's callback has run": Scenario(
        clear_before_the_callback,
        {"manual_shutdown": Expected("success", tries=3, submits=4, cause="Cluster .* stopped")},
    ),
    "two runs of a DAG share a cluster": Scenario(
        beside(),
        {"parallel_single_node": Expected("success", submits=10, cause="Cluster .* stopped")},
    ),
    "two DAGs share a manifest": Scenario(
        beside("_beside"),
        {"parallel_single_node": Expected("success", submits=10, cause="Cluster .* stopped")},
    ),
}
