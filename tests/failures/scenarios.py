"""The failures, and the expected outcome for each DAG."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from tests.failures.events import (
    LONG,
    Act,
    Fault,
    always,
    beside,
    cancel_from_elsewhere,
    clear_before_the_callback,
    clear_killed_task_whose_code_was_changed,
    clear_only_failed,
    clear_only_failed_of_uneven_length,
    clear_task,
    clear_task_whose_code_was_changed,
    defer_once,
    delete_dag,
    edit_dag,
    end_without_triggerer,
    fail_one_of_three,
    fault,
    freeze_triggerer,
    freeze_worker,
    kill_one_of_two_triggerers,
    kill_only_try,
    kill_second_try_at_once,
    kill_triggerer,
    kill_worker,
    kill_worker_at_every_try,
    kill_worker_while_the_cluster_starts,
    leave_query,
    let_queries_end,
    mark_run_failed,
    mark_success_while_cancels_are_refused,
    mark_task,
    mark_task_failed,
    meet,
    open_gate,
    outdated_manifest,
    pause_dag,
    restart_polars_cloud,
    restart_scheduler,
    shut_worker_down,
    side_by_side,
    stop_triggerer_for_a_while,
    take_api_server_away,
    upgrade_and_clear_one_task,
    wait_with_a_triggerer_without_the_library,
    wait_without_triggerer,
    while_the_cluster_starts,
    with_running_queries,
)

IDLE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Expected:
    """The expected outcome of a run.

    Attributes
    ----------
    run
        State of the run.
    submits, cancels
        Number of submitted queries and of cancels; None for at least one cancel.
    failed
        Tasks that end as failed.
    tries
        Maximum number of tries of a task; None for any number.
    cause
        Regular expression that the tasks' logs match.
    queries_left
        Queries that still run when the run has ended.
    clusters_left
        Clusters that still run then, until their idle timeout stops them.
    clusters
        Number of started clusters; None for any number.
    """

    run: str
    submits: int
    cancels: int | None = 0
    failed: frozenset[str] = frozenset()
    tries: int | None = 1
    cause: str = ""
    queries_left: int = 0
    clusters_left: int = 0
    clusters: int | None = None


@dataclass(frozen=True)
class Group:
    """Scenarios that stand under one heading of docs/failures.md.

    Attributes
    ----------
    heading
        What goes wrong.
    outcome
        How the DAGs handle it.
    scenarios
        By what happens.
    """

    heading: str
    outcome: str
    scenarios: Mapping[str, "Scenario"]


@dataclass(frozen=True)
class Scenario:
    """A failure or a user's action, and its outcomes.

    Attributes
    ----------
    act
        Starts a run of the DAG, makes it happen, and returns the run after its end.
    expected
        Outcome by DAG.
    """

    act: Act
    expected: Mapping[str, Expected] = field(default_factory=dict)


def failing(*tasks: str, tries: int = 2, **fields: Any) -> Expected:
    """Return the outcome of a failed run, in which each failed task was retried once."""
    return Expected("failed", failed=frozenset(tasks), tries=tries, **fields)


CANCELED = "Canceled query|Somebody canceled"
"""Logged by the ended task, or by the failed run's callback if that is faster."""

CANCELED_TRIGGER = "cancelled by user action|canceled the trigger"
"""Logged by Airflow, or by the trigger on Airflow 3.2."""

KILLED = f"Canceled query|{CANCELED_TRIGGER}"
"""Logged by the trigger, by the next try, or by the failed run's callback if that is faster."""

UNAVAILABLE = "is unavailable, retrying"
REPLY_LOST = "accepted although the reply was lost"
REGISTERED_ANEW = "Registering manifest"
STATUS, CONTEXT, MANUAL = "count_order_statuses", "value_stock", "find_best_customers"
SHELVES, REFUNDS = "find_empty_shelves", "sum_refunds"

SLOW = fault("SubmitQuery", "query_takes", seconds=5, times=2)
"""Queries that take long enough to be polled."""

OUT_OF_ORDER: Mapping[str, tuple[Fault, ...]] = {
    "while_logging_in": (
        *(fault("POST token", "http_error", status=status) for status in (500, 503)),
        fault("POST token", "connection_reset"),
        fault("GET user/me", "http_error", status=408),
    ),
    "while_looking_up_the_cluster": (
        *(fault("GET workspace", "http_error", status=status) for status in (425, 503)),
        fault("GET manifest/find", "http_error", status=503),
        fault("GET manifest/find", "connection_reset"),
    ),
    "while_starting": tuple(
        fault("POST manifest/start", kind, **fields)
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
        SLOW,
        *(
            fault("GetQueryStatus", "grpc_error", code=code, message="not now")
            for code in ("RESOURCE_EXHAUSTED", "INTERNAL", "UNAVAILABLE")
        ),
        fault("GetQueryStatus", "connection_reset"),
    ),
}

QUERIES: Mapping[str, Scenario] = {
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
            "remote_engine": failing("ask", submits=2, cause="no such type"),
            "published_line": failing("ask", submits=2, cause="no such type"),
        },
    ),
    "the first of two queries fails": Scenario(
        meet(
            fault("SubmitQuery", "query_fails", error="SchemaError: no such type"),
            fault("SubmitQuery", "query_hangs", nth=2),
        ),
        {"two_queries": Expected("success", tries=2, submits=4, cancels=1, cause="no such type")},
    ),
    "nobody waits for a query": Scenario(
        meet(always("SubmitQuery", "query_hangs")),
        {
            "published_line": failing(
                "ask", submits=2, cancels=2, cause="has not waited for its query"
            )
        },
    ),
    "one of three siblings fails while the others run": Scenario(
        fail_one_of_three,
        {
            "complete_pipeline": failing(
                "transform_returns", submits=4, cause="SchemaError.*quantity"
            )
        },
    ),
    "a query is canceled from elsewhere": Scenario(
        with_running_queries({}, cancel_from_elsewhere),
        {
            "status_check": failing(
                STATUS,
                tries=1,
                submits=1,
                cancels=1,
                clusters_left=1,
                cause="Somebody canceled this query",
            ),
            "context_manager_shutdown": failing(
                CONTEXT, tries=1, submits=1, cancels=1, cause="Somebody canceled this query"
            ),
            "status_check_by_proxy": failing(
                STATUS,
                tries=1,
                submits=1,
                cancels=1,
                clusters_left=1,
                cause="Somebody canceled this query",
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
            "remote_engine": failing("ask", submits=2, cancels=2, cause="Timeout"),
        },
    ),
    "a query outlasts the run's dagrun_timeout": Scenario(
        meet(always("SubmitQuery", "query_hangs")),
        {
            "manual_shutdown_run_out_of_time": Expected(
                "failed", submits=2, cancels=2, cause="no worker slot is held"
            )
        },
    ),
}

CLUSTERS: Mapping[str, Scenario] = {
    "the cluster does not start": Scenario(
        meet(always("POST manifest/start", "startup_fails", message="no machines left")),
        {
            "status_check": failing(STATUS, submits=0, cause="no machines left"),
            "context_manager_shutdown": failing(CONTEXT, submits=0, cause="no machines left"),
            "manifest_reuse": failing(REFUNDS, submits=0, cause="no machines left"),
            "manual_shutdown": failing("start_cluster", submits=0, cause="no machines left"),
        },
    ),
    "the cluster takes minutes to start": Scenario(
        while_the_cluster_starts(let_queries_end),
        {
            "manual_shutdown": Expected(
                "success", submits=2, clusters=1, cause="no worker slot is held"
            ),
            "manifest_reuse": Expected(
                "success",
                submits=1,
                clusters=1,
                clusters_left=1,
                cause="no worker slot is held",
            ),
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
        meet(fault("SubmitQuery", "cluster_lost", nth=3, times=9, message="reclaimed")),
        {"multi_stage": failing("find_best_days", submits=4, cause="nothing to stop")},
    ),
    "the shutdown fails": Scenario(
        meet(always("POST compute/{id}/stop", "http_error", status=500)),
        {
            "manual_shutdown": Expected(
                "success", submits=2, clusters_left=1, cause="Could not end .*Status 500"
            )
        },
    ),
    "the stop is refused after the query has succeeded": Scenario(
        meet(always("POST compute/{id}/stop", "http_error", status=403)),
        {
            "context_manager_shutdown": Expected(
                "success", submits=1, clusters_left=1, cause="Could not end .*Status 403"
            )
        },
    ),
}

CALLS: Mapping[str, Scenario] = {
    **{
        f"429, 500, 503 and a reset {phase.replace('_', ' ')}": Scenario(
            meet(*faults),
            {
                "status_check": Expected("success", submits=1, clusters_left=1, cause=UNAVAILABLE),
                "manual_shutdown": Expected("success", submits=2, cause=UNAVAILABLE),
            },
        )
        for phase, faults in OUT_OF_ORDER.items()
    },
    "a status that says nothing about the query": Scenario(
        meet(
            SLOW,
            *(
                fault("GetQueryStatus", "grpc_error", code=code, message="not now")
                for code in ("DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN")
            ),
        ),
        {"status_check": Expected("success", submits=1, clusters_left=1, cause=UNAVAILABLE)},
    ),
    "a call that is never answered while starting": Scenario(
        meet(fault("POST manifest/start", "stall")),
        # The client itself gives up the request and repeats it.
        {"manual_shutdown": Expected("success", submits=2, cause="Cluster .* is running")},
    ),
    "a call that is never answered while submitting": Scenario(
        meet(fault("SubmitQuery", "stall")),
        {"status_check": Expected("success", submits=1, clusters_left=1, cause="no reply for")},
    ),
    "a call that is never answered while polling": Scenario(
        meet(SLOW, fault("GetQueryStatus", "stall")),
        {"status_check": Expected("success", submits=1, clusters_left=1, cause="no reply for")},
    ),
    "the answer to a submission is lost": Scenario(
        meet(fault("SubmitQuery", "answer_lost")),
        {
            "single_query": Expected("success", submits=1, clusters_left=1, cause=REPLY_LOST),
            # The query of a temporary result cannot be found: it has no destination.
            "multi_stage": Expected("success", submits=4, queries_left=0, cause="unavailable"),
            "status_check": Expected(
                "success", submits=1, clusters_left=1, cause="accepted although the reply was lost"
            ),
            "manual_shutdown": Expected(
                "success", submits=2, cause="accepted although the reply was lost"
            ),
            "status_check_by_proxy": Expected(
                "success", submits=1, clusters_left=1, cause=REPLY_LOST
            ),
        },
    ),
    "the answer to a cluster's start is lost": Scenario(
        meet(fault("POST manifest/start", "answer_lost")),
        {
            "manifest_reuse": Expected("success", submits=1, clusters_left=1, cause=UNAVAILABLE),
            "manual_shutdown": Expected("success", submits=2, cause=UNAVAILABLE),
            "context_manager_shutdown": Expected("success", submits=1, cause=UNAVAILABLE),
        },
    ),
    "an outage outlasts the budget": Scenario(
        meet(
            fault("SubmitQuery", "query_hangs"),
            always("GetQueryStatus", "grpc_error", code="UNAVAILABLE", message="down"),
        ),
        {
            # Each try and the run's callback cancel it, because neither learns of its end.
            "status_check": failing(STATUS, submits=1, cancels=None, clusters_left=1, cause="down"),
            # The cluster is stopped, so the next try submits another query.
            "context_manager_shutdown": failing(CONTEXT, submits=2, cancels=2, cause="down"),
        },
    ),
    "Polars Cloud restarts in mid-query": Scenario(
        with_running_queries({}, restart_polars_cloud),
        {
            "status_check": Expected("success", submits=1, clusters_left=1, cause=UNAVAILABLE),
            "context_manager_shutdown": Expected("success", submits=1, cause=UNAVAILABLE),
            "context_manager_shutdown_by_proxy": Expected("success", submits=1, cause=UNAVAILABLE),
        },
    ),
}

LOGINS_AND_MANIFESTS: Mapping[str, Scenario] = {
    "the login expires in mid-wait": Scenario(
        meet(SLOW, fault("GetQueryStatus", "tokens_expire", nth=2)),
        {
            "status_check": Expected("success", submits=1, clusters_left=1, cause="Login expired"),
            "manual_shutdown": Expected("success", submits=2, cause="Login expired"),
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
        {"manifest_reuse": Expected("success", submits=1, clusters_left=1, cause=REGISTERED_ANEW)},
    ),
    "the manifest is for another Polars": Scenario(
        outdated_manifest(polars_version="1.41.2"),
        {"manual_shutdown": Expected("success", submits=2, cause=REGISTERED_ANEW)},
    ),
    "the cluster's size was changed in the code": Scenario(
        outdated_manifest(cluster_size=1, idle_timeout_mins=20),
        {
            "manifest_reuse": Expected(
                "success",
                submits=1,
                clusters_left=1,
                cause="cluster_size 1 → 2, idle_timeout_mins 20 → 10",
            )
        },
    ),
    "one task is cleared after Polars was upgraded": Scenario(
        upgrade_and_clear_one_task,
        {
            # The clusters of the old and the new version both idle.
            "manifest_reuse": Expected(
                "success", tries=2, submits=2, clusters_left=2, cause=REGISTERED_ANEW
            )
        },
    ),
}

WORKERS: Mapping[str, Scenario] = {
    "the only try is killed, and a later task turns the run green": Scenario(
        with_running_queries({}, kill_only_try),
        {
            "notified": Expected(
                "success",
                submits=1,
                cancels=1,
                failed=frozenset({"ask"}),
                cause="Process terminated by signal",
            )
        },
    ),
    "the only try is killed, in a DAG without callbacks": Scenario(
        with_running_queries({}, kill_only_try, after=defer_once),
        {
            "notified_without_callbacks": Expected(
                "success",
                submits=2,
                cancels=1,
                failed=frozenset({"ask"}),
                clusters=2,
                clusters_left=1,
                cause="Process terminated by signal",
            )
        },
    ),
    "the worker is killed after submitting": Scenario(
        with_running_queries({}, kill_worker, takes=LONG),
        {
            "status_check": Expected(
                "success", tries=2, submits=1, clusters_left=1, cause="Resuming query"
            ),
            "context_manager_shutdown": Expected(
                "success", tries=2, submits=1, cause="Resuming query"
            ),
            # In the seconds between submission and deferral.
            "multi_stage": Expected("success", tries=2, submits=3, cause="Resuming query"),
            "context_manager_shutdown_by_proxy": Expected(
                "success", tries=2, submits=1, cause="Resuming query"
            ),
        },
    ),
    "the worker of two queries is killed": Scenario(
        with_running_queries({"two_queries": 2}, kill_worker, takes=LONG),
        {"two_queries": Expected("success", tries=2, submits=2, cause="Resuming query")},
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
            "status_check_by_proxy": failing(
                STATUS, submits=1, cancels=1, clusters_left=1, cause="Process terminated by signal"
            ),
        },
    ),
    "the second try is killed before it has done anything": Scenario(
        with_running_queries({}, kill_second_try_at_once),
        {
            "status_check": failing(
                STATUS, submits=1, cancels=1, clusters_left=1, cause="Process terminated by signal"
            ),
            "context_manager_shutdown": failing(
                CONTEXT, submits=1, cancels=1, cause="Process terminated by signal"
            ),
        },
    ),
    "the worker is killed while the cluster starts": Scenario(
        kill_worker_while_the_cluster_starts,
        {
            "context_manager_shutdown": Expected(
                "success", tries=2, submits=1, clusters=1, cause="Cluster .* stopped"
            ),
            "status_check": Expected(
                "success", tries=2, submits=1, clusters_left=1, clusters=1, cause="wrote"
            ),
            "manual_shutdown": Expected(
                "success", tries=2, submits=2, clusters=1, cause="Cluster .* stopped"
            ),
        },
    ),
    "a frozen worker wakes up when the next try has resumed its query": Scenario(
        with_running_queries({}, freeze_worker, takes=LONG),
        {
            "status_check": Expected(
                "success", tries=2, submits=1, clusters_left=1, cause="Resuming query"
            ),
            "context_manager_shutdown": Expected(
                "success", tries=2, submits=1, clusters=1, cause="Resuming query"
            ),
        },
    ),
    "the worker is shut down in mid-query": Scenario(
        with_running_queries({}, shut_worker_down, takes=LONG),
        {
            "status_check": Expected(
                "success",
                tries=2,
                submits=1,
                clusters_left=1,
                cause="keep running; the next try resumes",
            ),
            "context_manager_shutdown": Expected(
                "success",
                tries=2,
                submits=1,
                clusters=1,
                cause="keep running; the next try resumes",
            ),
        },
    ),
    "the scheduler restarts in mid-query": Scenario(
        with_running_queries({}, restart_scheduler, takes=LONG),
        {
            "status_check": Expected(
                "success", tries=2, submits=1, clusters_left=1, cause="Resuming query"
            )
        },
    ),
    "Airflow's API server is away in mid-query": Scenario(
        with_running_queries({}, take_api_server_away, takes=LONG),
        {
            "context_manager_shutdown_often_tried": Expected(
                "success", tries=None, submits=1, clusters=1, cause="Resuming query"
            )
        },
    ),
}

USERS: Mapping[str, Scenario] = {
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
            "context_manager_shutdown_by_proxy": failing(
                CONTEXT, tries=1, submits=1, cancels=1, cause=CANCELED
            ),
        },
    ),
    "a user marks the task success": Scenario(
        with_running_queries({"two_queries": 2}, mark_task("success")),
        {"two_queries": Expected("success", submits=2, cancels=2, cause="Canceled query")},
    ),
    "a user marks the task skipped": Scenario(
        with_running_queries({"two_queries": 2}, mark_task("skipped")),
        {"two_queries": Expected("success", submits=2, cancels=2, cause="Canceled query")},
    ),
    "a user marks the task success while cancels are refused": Scenario(
        with_running_queries({}, mark_success_while_cancels_are_refused),
        {"notified": Expected("success", submits=1, cancels=None, cause="Could not end query")},
    ),
    "a user marks the task failed while its cluster starts": Scenario(
        while_the_cluster_starts(mark_task("failed")),
        {
            "manual_shutdown": failing(
                "start_cluster", tries=1, submits=0, clusters=1, cause=CANCELED_TRIGGER
            ),
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
    "a task with two queries is cleared and its code was changed": Scenario(
        with_running_queries({"two_queries": 2}, clear_task_whose_code_was_changed),
        {"two_queries": Expected("success", tries=2, submits=4, cancels=2, cause="Canceled query")},
    ),
    "the worker is killed, and the task is cleared and its code was changed": Scenario(
        with_running_queries(
            {"two_queries_retried_later": 2}, clear_killed_task_whose_code_was_changed
        ),
        {
            "two_queries_retried_later": Expected(
                "success", tries=2, submits=4, cancels=2, cause="it submits all its queries again"
            )
        },
    ),
    "failed tasks are cleared after the cluster was stopped": Scenario(
        clear_only_failed,
        {"manual_shutdown": Expected("success", tries=3, submits=4, cause="Cluster .* stopped")},
    ),
    "failed tasks of uneven length are cleared after the cluster was stopped": Scenario(
        clear_only_failed_of_uneven_length,
        {"manual_shutdown": Expected("success", tries=3, submits=6, cause="Cluster .* stopped")},
    ),
    "failed tasks are cleared before the run's callback has run": Scenario(
        clear_before_the_callback,
        {"manual_shutdown": Expected("success", tries=3, submits=4, cause="Cluster .* stopped")},
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
    "a user marks the deferred task failed": Scenario(
        with_running_queries({"manual_shutdown": 2}, mark_task_failed, takes=LONG, deferred=True),
        {
            "manual_shutdown": failing(MANUAL, tries=1, submits=2, cancels=1, cause=KILLED),
            "manifest_reuse": failing(
                REFUNDS, tries=1, submits=1, cancels=1, clusters_left=1, cause=KILLED
            ),
            "manifest_reuse_by_proxy": failing(
                REFUNDS, tries=1, submits=1, cancels=1, clusters_left=1, cause=KILLED
            ),
        },
    ),
    "a user marks the deferred task success": Scenario(
        with_running_queries({}, mark_task("success"), deferred=True),
        {
            "manifest_reuse": Expected(
                "success", submits=1, cancels=1, clusters_left=1, cause=KILLED
            ),
        },
    ),
    "a user marks the deferred task skipped": Scenario(
        with_running_queries({}, mark_task("skipped"), deferred=True),
        {
            "multi_stage": Expected("success", submits=1, cancels=1, cause=KILLED),
            "manifest_reuse": Expected(
                "success", submits=1, cancels=1, clusters_left=1, cause=KILLED
            ),
        },
    ),
    "a user clears the deferred task": Scenario(
        with_running_queries({}, clear_task, deferred=True),
        {
            "multi_stage": Expected("success", tries=2, submits=4, cancels=1, cause=KILLED),
            "manifest_reuse": Expected(
                "success", tries=2, submits=2, cancels=1, clusters_left=1, cause=KILLED
            ),
        },
    ),
    "a user marks the run failed while its tasks are deferred": Scenario(
        with_running_queries({"manual_shutdown": 2}, mark_run_failed, deferred=True),
        {
            "manual_shutdown": failing(
                MANUAL, SHELVES, tries=1, submits=2, cancels=2, cause=KILLED
            ),
            "manifest_reuse": failing(
                REFUNDS, tries=1, submits=1, cancels=1, clusters_left=1, cause=KILLED
            ),
        },
    ),
    "a user marks the deferred task while there is no triggerer": Scenario(
        with_running_queries({}, end_without_triggerer, deferred=True),
        {
            "manifest_reuse": Expected(
                "success", submits=2, cancels=1, clusters_left=1, cause="no worker slot is held"
            )
        },
    ),
}

TRIGGERERS: Mapping[str, Scenario] = {
    "tasks that return several queries are deferred": Scenario(
        with_running_queries({"returned_queries": 5}, let_queries_end, takes=LONG, deferred=True),
        {
            "returned_queries": Expected(
                "success", submits=5, clusters=2, cause="no worker slot is held"
            )
        },
    ),
    "the triggerer is stopped for a while": Scenario(
        with_running_queries(
            {"manual_shutdown": 2}, stop_triggerer_for_a_while, takes=LONG, deferred=True
        ),
        {"manual_shutdown": Expected("success", submits=2, clusters=1, cause="Cluster .* stopped")},
    ),
    "the triggerer is killed": Scenario(
        with_running_queries({}, kill_triggerer, takes=LONG, deferred=True),
        {
            dag_id: Expected("success", submits=3, clusters=1, cause="Cluster .* stopped")
            for dag_id in ("multi_stage", "multi_stage_by_proxy")
        },
    ),
    "one of two triggerers is killed": Scenario(
        with_running_queries(
            {"manual_shutdown": 2}, kill_one_of_two_triggerers, takes=LONG, deferred=True
        ),
        {"manual_shutdown": Expected("success", submits=2, clusters=1, cause="Cluster .* stopped")},
    ),
    "a frozen triggerer wakes up when another has taken its task over": Scenario(
        with_running_queries({}, freeze_triggerer, takes=LONG, deferred=True),
        {"multi_stage": Expected("success", submits=3, clusters=1, cause="Cluster .* stopped")},
    ),
    "no triggerer watches a deferred task": Scenario(
        wait_without_triggerer,
        {
            "without_triggerer": Expected(
                "success", submits=1, cause="waits in its worker from now on"
            )
        },
    ),
    "the triggerer cannot import the library": Scenario(
        wait_with_a_triggerer_without_the_library,
        {
            "without_triggerer": Expected(
                "success",
                submits=1,
                cause=r"\(ModuleNotFoundError: No module named 'polars_remote'\)",
            )
        },
    ),
}

SHARED_CLUSTERS: Mapping[str, Scenario] = {
    "two runs of a DAG share a cluster": Scenario(
        beside(),
        {"parallel_single_node": Expected("success", submits=10, cause="Cluster .* stopped")},
    ),
    "two DAGs share a manifest": Scenario(
        beside("_beside"),
        {"parallel_single_node": Expected("success", submits=10, cause="Cluster .* stopped")},
    ),
    "two clusters are shared in one run, and one is stopped first": Scenario(
        with_running_queries({}, open_gate, takes=LONG),
        {"two_scopes": Expected("success", submits=2, clusters=2, cause="Cluster .* stopped")},
    ),
    "a task detaches a query in a run that also shares a cluster": Scenario(
        with_running_queries({}, leave_query, takes=LONG),
        {
            "left_beside_scope": Expected(
                "success", submits=2, clusters=2, clusters_left=1, cause="Cluster .* stopped"
            )
        },
    ),
    "five days of a backfill at once": Scenario(
        side_by_side(5),
        {
            "complete_pipeline": Expected(
                "success", submits=20, clusters=1, cause="Cluster .* stopped|other users"
            )
        },
    ),
    "many mapped tasks of uneven length": Scenario(
        meet(),
        {"many_tasks": Expected("success", submits=24, clusters=1, cause="Cluster .* stopped")},
    ),
}

DAG_FILES: Mapping[str, Scenario] = {
    "the DAG file is edited in mid-query": Scenario(
        with_running_queries({}, edit_dag, takes=LONG, deferred=True),
        {"multi_stage": Expected("success", submits=3, cause="Cluster .* stopped")},
    ),
    "the DAG is paused in mid-query": Scenario(
        with_running_queries({}, pause_dag, takes=LONG),
        {"multi_stage": Expected("success", submits=3, cause="Cluster .* stopped")},
    ),
    "the DAG file is deleted in mid-query": Scenario(
        with_running_queries({}, delete_dag, takes=LONG),
        {
            "context_manager_shutdown": Expected(
                "success", submits=1, clusters=1, cause="Cluster .* stopped"
            )
        },
    ),
}

GROUPS = (
    Group(
        "A query fails, hangs or is canceled",
        "The task fails, with the query's own error if it has one. The task's other queries are "
        "canceled.",
        QUERIES,
    ),
    Group(
        "A cluster does not start, is lost or does not stop",
        "The task is retried, and starts the cluster again. If the stop is refused, the "
        "task logs a warning and keeps its state.",
        CLUSTERS,
    ),
    Group(
        "Polars Cloud is unavailable, or a reply is lost",
        "Each call is retried for up to `POLARS_CLOUD_OUTAGE` seconds. Queries keep running. If "
        "the outage is longer, the task fails.",
        CALLS,
    ),
    Group(
        "The login or the manifest is not valid any more",
        "The task logs in again, and registers or changes the manifest as the code says. If the "
        "credentials are refused, the task fails.",
        LOGINS_AND_MANIFESTS,
    ),
    Group(
        "A worker, the scheduler or Airflow's API server stops",
        "Queries keep running, and the next try resumes them. After the last try, the DAG's "
        "callbacks, the triggerer or the next user of the cluster cancel them.",
        WORKERS,
    ),
    Group(
        "A user marks or clears a task or a run",
        "The queries of the task are canceled. A cleared task submits new ones, and starts the "
        "cluster again if it has stopped.",
        USERS,
    ),
    Group(
        "A triggerer stops, or no triggerer watches the task",
        "Another triggerer continues to watch the queries. Without one, the task waits in its "
        "worker.",
        TRIGGERERS,
    ),
    Group(
        "Several tasks, runs or DAGs share a cluster",
        "The last user stops the cluster. No other task, run or DAG stops it while a task uses it.",
        SHARED_CLUSTERS,
    ),
    Group(
        "A DAG file is edited, paused or deleted",
        "Queries keep running. A run of a paused or deleted DAG ends when the DAG is back.",
        DAG_FILES,
    ),
)

SCENARIOS: Mapping[str, Scenario] = {
    what: scenario for group in GROUPS for what, scenario in group.scenarios.items()
}

SHOWN_WITHOUT_SCHEDULER: Mapping[str, str] = {
    "a query fails": (
        "tests/test_dags_end_to_end.py::"
        "test_a_failed_query_fails_the_run_with_its_own_exception_and_leaves_no_more_behind"
    ),
    "nobody waits for a query": (
        "tests/test_scope.py::test_a_query_that_nobody_has_waited_for_is_an_error_and_canceled"
    ),
    "a query is canceled from elsewhere": (
        "tests/test_queries.py::test_a_query_canceled_from_elsewhere_fails_the_task_for_good"
    ),
    "the cluster does not start": (
        "tests/test_clusters.py::test_a_cluster_that_does_not_start_says_why"
    ),
    "the cluster is lost in mid-query": (
        "tests/test_queries.py::"
        "test_a_query_whose_cluster_has_failed_under_it_is_not_submitted_again"
    ),
    "the shutdown finds nothing to stop": (
        "tests/test_clusters.py::test_stop_is_quiet_when_nothing_is_running"
    ),
    "the shutdown fails": (
        "tests/test_clusters.py::test_a_stop_that_fails_is_a_warning_and_left_to_the_sweep"
    ),
    "the stop is refused after the query has succeeded": (
        "tests/test_clusters.py::"
        "test_a_stop_that_is_refused_after_a_good_body_is_a_warning_and_left_to_the_sweep"
    ),
    "429, 500, 503 and a reset while logging in": (
        "tests/test_retry.py::test_an_outage_at_the_login_is_waited_for"
    ),
    "429, 500, 503 and a reset while looking up the cluster": (
        "tests/test_clusters.py::test_an_outage_at_any_step_is_survived"
    ),
    "429, 500, 503 and a reset while starting": (
        "tests/test_clusters.py::test_an_outage_at_any_step_is_survived"
    ),
    "429, 500, 503 and a reset while submitting": (
        "tests/test_queries.py::test_a_submission_that_was_not_accepted_is_repeated"
    ),
    "429, 500, 503 and a reset while polling": (
        "tests/test_queries.py::test_an_outage_while_waiting_is_survived"
    ),
    "a status that says nothing about the query": (
        "tests/test_retry.py::test_a_scheduler_that_is_unavailable_is_waited_for"
    ),
    "a call that is never answered while submitting": (
        "tests/test_queries.py::"
        "test_a_submission_that_is_accepted_after_it_was_repeated_leaves_no_second_query"
    ),
    "a call that is never answered while polling": (
        "tests/test_retry.py::test_a_call_without_a_reply_is_abandoned_and_repeated"
    ),
    "the answer to a submission is lost": (
        "tests/test_queries.py::test_a_submission_whose_reply_is_lost_is_found_again"
    ),
    "the answer to a cluster's start is lost": (
        "tests/test_clusters.py::test_a_start_whose_reply_is_lost_starts_no_second_cluster"
    ),
    "an outage outlasts the budget": (
        "tests/test_retry.py::test_an_outage_that_outlasts_the_budget_is_an_error"
    ),
    "the login expires in mid-wait": "tests/test_auth.py::test_task_logs_in_again_and_continues",
    "the manifest is missing": "tests/test_manifests.py::test_an_absent_manifest_is_registered",
    "the manifest is for another Python": (
        "tests/test_manifests.py::test_a_manifest_of_other_versions_is_registered_again"
    ),
    "the manifest is for another Polars": (
        "tests/test_manifests.py::test_a_manifest_of_other_versions_is_registered_again"
    ),
    "two runs of a DAG share a cluster": (
        "tests/test_clusters.py::test_stop_leaves_a_query_of_another_run_running"
    ),
    "the worker of two queries is killed": (
        "tests/test_queries.py::test_the_next_try_of_a_killed_worker_resumes_all_its_queries"
    ),
    "a user marks the task success": (
        "tests/test_scope.py::"
        "test_sigterm_to_a_task_that_was_ended_ends_its_queries_and_its_cluster"
    ),
    "a user marks the task skipped": (
        "tests/test_scope.py::"
        "test_sigterm_to_a_task_that_was_ended_ends_its_queries_and_its_cluster"
    ),
    "the first of two queries fails": (
        "tests/test_scope.py::test_one_query_that_fails_ends_the_other_with_the_task"
    ),
    "the second try is killed before it has done anything": (
        "tests/test_end.py::"
        "test_what_a_second_try_has_left_that_died_before_it_resumed_anything_is_found"
    ),
    "the cluster's size was changed in the code": (
        "tests/test_manifests.py::test_a_changed_specification_is_applied_and_logged"
    ),
    "one task is cleared after Polars was upgraded": (
        "tests/test_clusters.py::"
        "test_a_task_that_is_run_alone_after_an_upgrade_registers_the_manifest_again"
    ),
    "a task detaches a query in a run that also shares a cluster": (
        "tests/test_clusters.py::test_stop_leaves_a_query_alone_that_a_task_of_the_run_has_detached"
    ),
}
"""Tests that cover some scenarios without a scheduler."""
