"""What goes wrong: each event is made to happen to a run of a DAG, which is then waited for."""

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
"""Seconds that a long query takes on the emulator's clock; less than a token lives."""

COLUMNS = {"sales": "status", "inventory": "on_hand", "returns": "quantity"}
"""A column of each table that its queries need."""

Act = Callable[[Deployment, str], Run]
"""Makes something happen to a run of the DAG, and gives that run, ended."""

Fault = dict[str, Any]


def fault(operation: str, kind: str, **fields: object) -> Fault:
    return {"operation": operation, "kind": kind, **fields}


def always(operation: str, kind: str, **fields: object) -> Fault:
    return fault(operation, kind, times=1_000, **fields)


def meet(*faults: Fault) -> Act:
    """A run that meets these faults."""

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
    """A run to whose queries something happens while they are running.

    Parameters
    ----------
    count
        How many of them run at the same time, by DAG; one unless given.
    takes
        Seconds that they take; for ever if None.
    deferred
        Whether their tasks are deferred already.
    after
        What has happened before.
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
    """Let those that take long end, one after the other where they wait for each other."""

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
    """The triggerer is stopped, and started when the queries have ended."""
    with airflow.without(TRIGGERER):
        let_queries_end(airflow, run)
        assert run.tasks_in("deferred")


def kill_triggerer(airflow: Deployment, run: Run) -> None:
    """SIGKILL for the triggerer; a new one finds the tasks of the dead one."""
    airflow.kill(TRIGGERER)
    with airflow.without(TRIGGERER):
        let_queries_end(airflow, run)


def kill_one_of_two_triggerers(airflow: Deployment, run: Run) -> None:
    """Another triggerer takes the tasks of a dead one over."""
    with airflow.running(SECOND_TRIGGERER):
        airflow.kill(TRIGGERER)
        let_queries_end(airflow, run)
        run.wait_for_end()
    with airflow.without(TRIGGERER):
        pass


def freeze_triggerer(airflow: Deployment, run: Run) -> None:
    """Freeze a triggerer until another one has taken its tasks over, and let it wake up then."""
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
    """A user marks the task while there is no triggerer; the next one finds what it has left."""
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
    """There is no triggerer; the task waits in its worker after a while."""
    airflow.emulator.api.add_fault("SubmitQuery", "query_takes", seconds=LONG)
    with airflow.without(TRIGGERER):
        run = airflow.trigger(dag_id)
        airflow.eventually(lambda: "waits in its worker from now on" in run.log())
        let_queries_end(airflow, run)
        run.wait_for_end()
    return run


def wait_with_a_triggerer_without_the_library(airflow: Deployment, dag_id: str) -> Run:
    """The triggerer has nothing on its path, as where the DAGs folder holds the library."""
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
    """Something happens to a task that is deferred until its cluster is running."""

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
    """SIGKILL for the process that runs the task, then time for the query to end."""
    task_id = run.running_tasks()[0]
    tries = run.tries(task_id)
    run.process(task_id).kill()
    airflow.eventually(lambda: run.tries(task_id) > tries)
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def kill_only_try(airflow: Deployment, run: Run) -> None:
    """SIGKILL for the process of a task that is not tried again."""
    run.process("ask").kill()
    airflow.eventually(lambda: run.tasks()["ask"] == "failed")


def defer_once(airflow: Deployment) -> None:
    """Another run has a task that is deferred: from then on the triggerer sweeps."""
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


def fail_once(airflow: Deployment, dag_id: str, *tables: str) -> Run:
    """A run that failed for a reason that is gone."""
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
    # A callback that came while its file was being parsed is held back until the next time.
    with airflow.edited(dag_id, commented):
        airflow.eventually(
            lambda: "is active: nothing of it is ended" in airflow.callback_log(dag_id)
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


def mark_task(state: str) -> Callable[[Deployment, Run], None]:
    """A user marks the task in mid-query."""

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
    """The worker is killed, and the user does not wait for the next try."""
    run.process("ask_twice").kill()
    airflow.eventually(lambda: run.tasks_in("up_for_retry"))
    clear_task_whose_code_was_changed(airflow, run)


def kill_second_try_at_once(airflow: Deployment, run: Run) -> None:
    """SIGKILL for the second try before it has done anything."""
    [task_id] = run.running_tasks()
    run.process(task_id).kill()
    airflow.eventually(lambda: run.tries(task_id) == 2 and run.running_tasks())
    run.process(task_id).kill()


def freeze_worker(airflow: Deployment, run: Run) -> None:
    """Freeze the worker until the next try has resumed the query, and let it wake up then."""
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
    assert not process.is_running(), "the frozen worker runs on"
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def shut_worker_down(airflow: Deployment, run: Run) -> None:
    """SIGTERM for the task's process, as when its machine is taken away."""
    [task_id] = run.running_tasks()
    run.process(task_id).terminate()
    airflow.eventually(lambda: run.tries(task_id) == 2)
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def take_api_server_away(airflow: Deployment, run: Run) -> None:
    """Airflow's API server is away for longer than the task's heartbeats may fail."""
    [task_id] = run.running_tasks()
    process = run.process(task_id)
    with airflow.without(API_SERVER):
        psutil.wait_procs([process], airflow.patience)
        assert not process.is_running(), "the task does not miss the API server"
    airflow.eventually(lambda: "Resuming query" in run.log())
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def commented(source: str) -> str:
    return f"{source}\n# Edited.\n"


def edit_dag(airflow: Deployment, run: Run) -> None:
    """The DAG file is edited, and parsed again, while the query runs."""
    before = airflow.parsed_at(run.dag_id)
    with airflow.edited(run.dag_id, commented):
        airflow.eventually(lambda: airflow.parsed_at(run.dag_id) != before)
        airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
        run.wait_for_end()


def pause_dag(airflow: Deployment, run: Run) -> None:
    """The DAG is paused in mid-query, until the query has ended."""
    airflow.call("PATCH", f"dags/{run.dag_id}", is_paused=True)
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
    airflow.eventually(lambda: not airflow.emulator.running_queries())
    airflow.call("PATCH", f"dags/{run.dag_id}", is_paused=False)


def delete_dag(airflow: Deployment, run: Run) -> None:
    """The DAG file is deleted while the query runs; Airflow ends such a run when it is back."""
    with airflow.deleted(run.dag_id):
        airflow.eventually(lambda: airflow.call("GET", f"dags/{run.dag_id}")["is_stale"])
        airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
        airflow.eventually(lambda: set(run.tasks().values()) == {"success"})
        assert not airflow.emulator.live_clusters()


def open_gate(airflow: Deployment, run: Run) -> None:
    """Let the other scope begin and end, then the query."""
    airflow.call("POST", "variables", key="gate", value="open")
    try:
        airflow.eventually(lambda: run.tasks().get("stop_cluster__1") == "success")
    finally:
        airflow.call("DELETE", "variables/gate")
    assert [query["cancels"] for query in airflow.emulator.queries()] == [0, 0]
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))


def leave_query(airflow: Deployment, run: Run) -> None:
    """The run ends; its query, that was left, runs to its end."""
    run.wait_for_end()
    assert len(airflow.emulator.running_queries()) == 1
    airflow.emulator.api.advance_clock(timedelta(seconds=LONG))
    airflow.eventually(lambda: not airflow.emulator.running_queries())
    assert {query["status"] for query in airflow.emulator.queries()} == {"Success"}


def clear_only_failed_of_uneven_length(airflow: Deployment, dag_id: str) -> Run:
    run = fail_once(airflow, dag_id, "sales", "inventory")
    # There is one worker: the short query comes first.
    airflow.emulator.api.add_fault("SubmitQuery", "query_takes", nth=2, seconds=LONG)
    run.clear(only_failed=True)
    # The short one has ended, and left the cluster to the long one.
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
    """Several runs of the DAG at once, as in a backfill; the last to end."""

    def act(airflow: Deployment, dag_id: str) -> Run:
        triggered = [airflow.trigger(dag_id) for _ in range(runs)]
        for run in triggered:
            run.wait_for_end()
            assert run.state == "success"
        return triggered[-1]

    return act


def upgrade_and_clear_one_task(airflow: Deployment, dag_id: str) -> Run:
    """A task is cleared alone after Polars was upgraded: the manifest is for the one before."""
    run = meet()(airflow, dag_id)
    name = manifest_of(dag_id)
    airflow.emulator.api.call("DELETE", f"manifest?name={name}")
    manifest = {**MANIFEST_BODY, "polars_version": "1.41.2", "name": name}
    airflow.emulator.api.call("POST", "manifest", manifest)
    run.clear("sum_refunds")
    airflow.eventually(lambda: run.state != "success")
    run.wait_for_end()
    return run
