"""Failures and user actions that happen to a run of a DAG. Each one waits for the run's end."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import boto3
import polars as pl
import psutil

from tests.failures.deployment import (
    API_SERVER,
    DAG_PROCESSOR,
    SCHEDULER,
    TRIGGERER,
    Deployment,
    Run,
)
from tests.manifest_body import MANIFEST_BODY

BUCKET = "your-bucket"
SECOND_TRIGGERER = f"{TRIGGERER} --capacity 999"
LONG = 100.0
"""Duration of a long query on the emulator's clock, in seconds. A token is valid for longer."""

COLUMNS = {"sales": "status", "inventory": "on_hand", "returns": "quantity"}
"""A column of each table that queries need."""

Act = Callable[[Deployment, str], Run]
"""Starts a run of the DAG, makes something happen to it, and returns it after its end."""

Fault = dict[str, Any]


def fault(operation: str, kind: str, **fields: object) -> Fault:
    return {"operation": operation, "kind": kind, **fields}


def always(operation: str, kind: str, **fields: object) -> Fault:
    return fault(operation, kind, times=1_000, **fields)


def meet(*faults: Fault) -> Act:
    """Return an act with a run that meets these faults."""

    def act(airflow: Deployment, dag_id: str) -> Run:
        for each in faults:
            airflow.emulator.api.add_fault(**each)
        run = airflow.trigger(dag_id)
        run.wait_for_end()
        return run

    return act


def with_running_queries(
    count: Mapping[str, int],
    then: Callable[[Deployment, Run], None],
    *,
    takes: float | None = None,
    deferred: bool = False,
    after: Callable[[Deployment], None] | None = None,
) -> Act:
    """Return an act in which something happens while the run's queries are running.

    Parameters
    ----------
    count
        Number of queries that run at the same time, by DAG; one by default.
    takes
        Duration of the queries in seconds; None for queries that never end.
    deferred
        Whether to wait until the tasks are deferred.
    after
        Called before the run starts.
    """

    def act(airflow: Deployment, dag_id: str) -> Run:
        emulator = airflow.emulator
        if after:
            after(airflow)
        wanted = count.get(dag_id, 1)
        kind = (
            {"kind": "query_hangs"} if takes is None else {"kind": "query_takes", "seconds": takes}
        )
        emulator.api.add_fault("SubmitQuery", times=wanted, **kind)
        run = airflow.trigger(dag_id)
        airflow.eventually(lambda: len(emulator.running_queries()) == wanted)
        if deferred:
            airflow.eventually(run.is_deferred)
        then(airflow, run)
        run.wait_for_end()
        return run

    return act


def let_queries_end(airflow: Deployment, run: Run) -> None:
    """Let the running queries end, and those that wait behind them."""

    def running() -> set[str]:
        return {query["id"] for query in airflow.emulator.running_queries() if query["started_at"]}

    def have_ended() -> bool:
        # Advance the clock once per query, and only while a query is running. Otherwise the cluster
        # reaches its idle timeout.
        airflow.eventually(lambda: running() or not airflow.emulator.running_queries())
        if now := running():
            airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
            airflow.eventually(lambda: now.isdisjoint(running()))
        return not airflow.emulator.running_queries()

    airflow.eventually(have_ended)


def stop_triggerer_for_a_while(airflow: Deployment, run: Run) -> None:
    """Stop the triggerer, and start it again when the queries have ended."""
    with airflow.without(TRIGGERER):
        let_queries_end(airflow, run)
        assert run.tasks_in("deferred")


def kill_triggerer(airflow: Deployment, run: Run) -> None:
    """Kill the triggerer with SIGKILL; a new one takes over its tasks."""
    airflow.kill(TRIGGERER)
    with airflow.without(TRIGGERER):
        let_queries_end(airflow, run)


def kill_one_of_two_triggerers(airflow: Deployment, run: Run) -> None:
    """Kill one of two triggerers; the other one takes over its tasks."""
    with airflow.running(SECOND_TRIGGERER):
        airflow.kill(TRIGGERER)
        let_queries_end(airflow, run)
        run.wait_for_end()
    with airflow.without(TRIGGERER):
        pass


def freeze_triggerer(airflow: Deployment, run: Run) -> None:
    """Freeze a triggerer until another one has taken over its tasks, then resume it."""
    frozen = airflow.processes[TRIGGERER]
    started = run.log().count(' starting"')
    with airflow.running(SECOND_TRIGGERER):
        processes = [frozen, *frozen.children(recursive=True)]
        for each in processes:
            each.suspend()
        try:
            airflow.eventually(lambda: run.log().count(' starting"') > started)
        finally:
            for each in processes:
                each.resume()
        airflow.eventually(lambda: "trigger completed" in run.log())
        assert [query["cancels"] for query in airflow.emulator.queries()] == [0]
        let_queries_end(airflow, run)
        run.wait_for_end()


def end_without_triggerer(airflow: Deployment, run: Run) -> None:
    """Mark the task while no triggerer runs; the next triggerer cleans up."""
    with airflow.without(TRIGGERER):
        run.mark("success", run.waiting_tasks()[0])
        run.wait_for_end()
    assert [query["cancels"] for query in airflow.emulator.queries()] == [0]
    airflow.emulator.api.add_fault("SubmitQuery", "query_takes", seconds=LONG)
    after = airflow.trigger(run.dag_id)
    airflow.eventually(after.is_deferred)
    airflow.eventually(lambda: airflow.emulator.queries()[0]["cancels"])
    let_queries_end(airflow, after)
    after.wait_for_end()


def wait_without_triggerer(airflow: Deployment, dag_id: str) -> Run:
    """Run no triggerer; after a while, the task waits in its worker."""
    airflow.emulator.api.add_fault("SubmitQuery", "query_takes", seconds=LONG)
    with airflow.without(TRIGGERER):
        run = airflow.trigger(dag_id)
        airflow.eventually(lambda: "waits in its worker from now on" in run.log())
        let_queries_end(airflow, run)
        run.wait_for_end()
    return run


def wait_with_a_triggerer_without_the_library(airflow: Deployment, dag_id: str) -> Run:
    """Run a triggerer that cannot import the library, as if the DAGs folder held the library."""
    airflow.emulator.api.add_fault("SubmitQuery", "query_takes", seconds=LONG)
    before = os.environ.copy()
    with airflow.without(TRIGGERER):
        os.environ |= {"PYTHONPATH": "", "AIRFLOW__CORE__PLUGINS_FOLDER": os.devnull}
        with airflow.running(TRIGGERER):
            os.environ |= before
            run = airflow.trigger(dag_id)
            airflow.eventually(lambda: "waits in its worker from now on" in run.log())
            let_queries_end(airflow, run)
            run.wait_for_end()
    warnings = [line for line in run.log().splitlines() if '"warning"' in line]
    assert len([line for line in warnings if "polars_remote" in line]) == 1, warnings
    assert "Traceback" not in run.log()
    return run


def while_the_cluster_starts(then: Callable[[Deployment, Run], None]) -> Act:
    """Return an act in which something happens while the task is deferred for its cluster."""

    def act(airflow: Deployment, dag_id: str) -> Run:
        airflow.emulator.api.add_fault("POST manifest/start", "startup_takes", seconds=LONG)
        run = airflow.trigger(dag_id)
        airflow.eventually(run.is_deferred)
        then(airflow, run)
        run.wait_for_end()
        return run

    return act


def cancel_from_elsewhere(airflow: Deployment, run: Run) -> None:
    [query] = airflow.emulator.running_queries()
    airflow.emulator.api.call("POST", f"query/{query['id']}/cancel")


def mark_task_failed(airflow: Deployment, run: Run) -> None:
    """Mark one task failed, and let the queries of others end."""
    emulator = airflow.emulator
    run.mark("failed", run.waiting_tasks()[0])
    airflow.eventually(lambda: any(query["cancels"] for query in emulator.queries()))
    airflow.eventually(lambda: {q["status"] for q in emulator.running_queries()} <= {"InProgress"})
    emulator.api.advance_clock(timedelta(seconds=LONG))


def mark_run_failed(airflow: Deployment, run: Run) -> None:
    run.mark("failed")


def clear_task(airflow: Deployment, run: Run) -> None:
    task_id = run.waiting_tasks()[0]
    tries = run.tries(task_id)
    run.clear(task_id)
    airflow.eventually(lambda: run.tries(task_id) > tries)


def kill_worker(airflow: Deployment, run: Run) -> None:
    """Kill the task's process with SIGKILL, and let the query end after the next try has begun."""
    task_id = run.running_tasks()[0]
    tries = run.tries(task_id)
    run.process(task_id).kill()
    airflow.eventually(lambda: run.tries(task_id) > tries)
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def kill_only_try(airflow: Deployment, run: Run) -> None:
    """Kill the process of a task without retries with SIGKILL."""
    run.process("ask").kill()
    airflow.eventually(lambda: run.tasks()["ask"] == "failed")


def defer_once(airflow: Deployment) -> None:
    """Run a task that is deferred, so that the triggerer begins to sweep."""
    airflow.emulator.api.add_fault("SubmitQuery", "query_takes", seconds=LONG)
    run = airflow.trigger("manifest_reuse")
    airflow.eventually(run.is_deferred)
    let_queries_end(airflow, run)
    run.wait_for_end()


def mark_success_while_cancels_are_refused(airflow: Deployment, run: Run) -> None:
    airflow.emulator.api.add_fault(
        "CancelQuery", "grpc_error", code="UNAVAILABLE", message="not now", times=1_000
    )
    run.mark("success", "ask")
    airflow.eventually(lambda: "Could not end query" in run.log())
    airflow.emulator.api.clear_faults()


def kill_worker_at_every_try(airflow: Deployment, run: Run) -> None:
    [task_id] = run.running_tasks()
    run.process(task_id).kill()
    airflow.eventually(lambda: run.tries(task_id) == 2 and run.running_tasks())
    airflow.eventually(lambda: "Resuming query" in run.log(task_id, "2"))
    run.process(task_id).kill()


def restart_scheduler(airflow: Deployment, run: Run) -> None:
    with airflow.without(SCHEDULER):
        pass
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def restart_polars_cloud(airflow: Deployment, run: Run) -> None:
    airflow.emulator.stop()
    airflow.emulator.start()


def break_data(airflow: Deployment, table: str, column: str) -> pl.DataFrame:
    """Remove a column from a table; return the whole table."""
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


def fail_once(airflow: Deployment, dag_id: str, *tables: str) -> Run:
    """Let a run fail on incomplete tables, complete the tables, and return the run."""
    whole = {name: break_data(airflow, name, COLUMNS[name]) for name in tables or ("sales",)}
    run = meet()(airflow, dag_id)
    assert run.state == "failed"
    assert not airflow.emulator.live_clusters()
    for name, table in whole.items():
        replace(airflow, name, table)
    return run


def clear_before_the_callback(airflow: Deployment, dag_id: str) -> Run:
    emulator = airflow.emulator
    with airflow.without(DAG_PROCESSOR):
        run = fail_once(airflow, dag_id)
        emulator.api.add_fault("SubmitQuery", "query_takes", seconds=LONG)
        run.clear(only_failed=True)
        airflow.eventually(emulator.running_queries)
        before = airflow.parsed_at(dag_id)
    airflow.eventually(lambda: airflow.parsed_at(dag_id) != before)
    # Airflow delays a callback that arrives during a parse until the next parse.
    with airflow.edited(dag_id, commented):
        airflow.eventually(
            lambda: (
                "is active: its queries and clusters keep running" in airflow.callback_log(dag_id)
            )
        )
        emulator.api.advance_clock(timedelta(seconds=LONG))
        run.wait_for_end()
    return run


def clear_only_failed(airflow: Deployment, dag_id: str) -> Run:
    run = fail_once(airflow, dag_id)
    run.clear(only_failed=True)
    airflow.eventually(lambda: run.state != "failed")
    run.wait_for_end()
    return run


def manifest_of(dag_id: str) -> str:
    return {"manual_shutdown": "airflow-manual-shutdown"}.get(dag_id, "airflow-production")


def outdated_manifest(**drift: object) -> Act:
    def act(airflow: Deployment, dag_id: str) -> Run:
        manifest = {**MANIFEST_BODY, **drift, "name": manifest_of(dag_id)}
        airflow.emulator.api.call("POST", "manifest", manifest)
        return meet()(airflow, dag_id)

    return act


def beside(suffix: str = "") -> Act:
    """Return an act in which a second run, of the same or another DAG, shares the cluster."""

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


def mark_task(state: str) -> Callable[[Deployment, Run], None]:
    """Return an event: a user marks the task while its query runs."""

    def act(airflow: Deployment, run: Run) -> None:
        run.mark(state, run.waiting_tasks()[0])

    return act


def clear_task_whose_code_was_changed(airflow: Deployment, run: Run) -> None:
    with airflow.edited(run.dag_id, lambda source: source.replace('"old"', '"new"')):
        airflow.emulator.api.clear_faults()
        run.clear("ask_twice")
        airflow.eventually(lambda: run.tries() == 2)
        run.wait_for_end()
    files = pl.read_parquet(
        f"s3://{BUCKET}/results/two_queries/", storage_options=storage_options(airflow)
    )
    assert files["version"].to_list() == ["new", "new"], "files of two code versions"


def clear_killed_task_whose_code_was_changed(airflow: Deployment, run: Run) -> None:
    """Kill the worker, and clear the task before its next try."""
    run.process("ask_twice").kill()
    airflow.eventually(lambda: run.tasks_in("up_for_retry"))
    clear_task_whose_code_was_changed(airflow, run)


def kill_second_try_at_once(airflow: Deployment, run: Run) -> None:
    """Kill the worker, and the second try before it has done anything."""
    [task_id] = run.running_tasks()
    run.process(task_id).kill()
    airflow.eventually(lambda: run.tries(task_id) == 2 and run.running_tasks())
    run.process(task_id).kill()


def freeze_worker(airflow: Deployment, run: Run) -> None:
    """Freeze the worker until the next try has resumed the query, then resume the worker."""
    [task_id] = run.running_tasks()
    process = run.process(task_id)
    supervisor = process.parent()
    assert supervisor is not None
    for each in (process, supervisor):
        each.suspend()
    try:
        airflow.eventually(lambda: run.tries(task_id) == 2 and "Resuming query" in run.log())
    finally:
        for each in (process, supervisor):
            each.resume()
    psutil.wait_procs([process], airflow.patience)
    assert not process.is_running(), "the frozen worker still runs"
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def shut_worker_down(airflow: Deployment, run: Run) -> None:
    """Send SIGTERM to the task's process, as when its machine shuts down."""
    [task_id] = run.running_tasks()
    run.process(task_id).terminate()
    airflow.eventually(lambda: run.tries(task_id) == 2)
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def take_api_server_away(airflow: Deployment, run: Run) -> None:
    """Stop Airflow's API server for longer than the task's heartbeats may fail."""
    [task_id] = run.running_tasks()
    process = run.process(task_id)
    with airflow.without(API_SERVER):
        psutil.wait_procs([process], airflow.patience)
        assert not process.is_running(), "the task runs on without the API server"
    airflow.eventually(lambda: "Resuming query" in run.log())
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def commented(source: str) -> str:
    return f"{source}\n# Edited.\n"


def edit_dag(airflow: Deployment, run: Run) -> None:
    """Edit the DAG file while the query runs, so that it is parsed again."""
    before = airflow.parsed_at(run.dag_id)
    with airflow.edited(run.dag_id, commented):
        airflow.eventually(lambda: airflow.parsed_at(run.dag_id) != before)
        airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
        run.wait_for_end()


def pause_dag(airflow: Deployment, run: Run) -> None:
    """Pause the DAG while the query runs, until it has ended."""
    airflow.call("PATCH", f"dags/{run.dag_id}", is_paused=True)
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
    airflow.eventually(lambda: not airflow.emulator.running_queries())
    airflow.call("PATCH", f"dags/{run.dag_id}", is_paused=False)


def delete_dag(airflow: Deployment, run: Run) -> None:
    """Delete the DAG file while the query runs; Airflow ends the run when the file is back."""
    with airflow.deleted(run.dag_id):
        airflow.eventually(lambda: airflow.call("GET", f"dags/{run.dag_id}")["is_stale"])
        airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
        airflow.eventually(lambda: set(run.tasks().values()) == {"success"})
        assert not airflow.emulator.live_clusters()


def open_gate(airflow: Deployment, run: Run) -> None:
    """Let the other shared cluster start and stop, then let the query end."""
    airflow.call("POST", "variables", key="gate", value="open")
    try:
        airflow.eventually(lambda: run.tasks().get("stop_cluster__1") == "success")
    finally:
        airflow.call("DELETE", "variables/gate")
    assert [query["cancels"] for query in airflow.emulator.queries()] == [0, 0]
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def leave_query(airflow: Deployment, run: Run) -> None:
    """Let the run end, and then its detached query."""
    run.wait_for_end()
    assert len(airflow.emulator.running_queries()) == 1
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
    airflow.eventually(lambda: not airflow.emulator.running_queries())
    assert {query["status"] for query in airflow.emulator.queries()} == {"Success"}


def clear_only_failed_of_uneven_length(airflow: Deployment, dag_id: str) -> Run:
    run = fail_once(airflow, dag_id, "sales", "inventory")
    # The short query comes first, because there is one worker.
    airflow.emulator.api.add_fault("SubmitQuery", "query_takes", nth=2, seconds=LONG)
    run.clear(only_failed=True)
    # The short query has ended, and the long one still uses the cluster.
    airflow.eventually(
        lambda: (
            len(airflow.emulator.running_queries()) == 1
            and len(run.tasks_in("running", "deferred")) == 1
            and sum(query["status"] == "Success" for query in airflow.emulator.queries()) == 1
        )
    )
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
    run.wait_for_end()
    return run


def kill_worker_while_the_cluster_starts(airflow: Deployment, dag_id: str) -> Run:
    emulator = airflow.emulator
    emulator.api.add_fault("POST manifest/start", "startup_takes", seconds=LONG)
    run = airflow.trigger(dag_id)
    airflow.eventually(lambda: [c["status"] for c in emulator.live_clusters()] == ["Starting"])
    [task_id] = run.running_tasks()
    run.process(task_id).kill()
    airflow.eventually(lambda: run.tries(task_id) == 2 and run.running_tasks())
    emulator.api.advance_clock(timedelta(seconds=LONG))
    run.wait_for_end()
    return run


def side_by_side(runs: int) -> Act:
    """Return an act with several simultaneous runs of the DAG, as in a backfill."""

    def act(airflow: Deployment, dag_id: str) -> Run:
        triggered = [airflow.trigger(dag_id) for _ in range(runs)]
        for run in triggered:
            run.wait_for_end()
            assert run.state == "success"
        return triggered[-1]

    return act


def upgrade_and_clear_one_task(airflow: Deployment, dag_id: str) -> Run:
    """Clear one task after an upgrade of Polars: the manifest has the old version."""
    run = meet()(airflow, dag_id)
    name = manifest_of(dag_id)
    airflow.emulator.api.call("DELETE", f"manifest?name={name}")
    manifest = {**MANIFEST_BODY, "polars_version": "1.41.2", "name": name}
    airflow.emulator.api.call("POST", "manifest", manifest)
    run.clear("sum_refunds")
    airflow.eventually(lambda: run.state != "success")
    run.wait_for_end()
    return run
