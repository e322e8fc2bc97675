"""Count a task's calls to Polars Cloud and to Airflow, and measure its overhead in seconds.

Each row is a run of a small DAG in this process, on a fresh emulator. *Airflow* counts the record's
requests to Airflow: Variables and the states of tasks. *Seconds* are those of the run, minus those
of its queries, and minus those of a run whose task does nothing.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pattern_runs import bundles
from rich.table import Column, Table

from demo import AIRFLOW_HOME, LOG
from local_airflow import ROOT, airflow_output_in, use_airflow, use_emulator
from polars_cloud_emulator.testing import RunningEmulator, eventually, running_emulator

FOLDERS = [ROOT / "benchmarks" / name for name in ("measured_tasks", "published_wiring")]
RECORD = {"GetVariable", "PutVariable", "DeleteVariable", "GetVariableKeys", "GetTaskStates"}
"""Messages that the record sends to Airflow."""
MAPPED = (5, 50, 200)
QUERIES = 100


def main() -> None:
    """Print the table."""
    with running_emulator() as emulator, airflow_output_in(LOG) as console:
        use_airflow(AIRFLOW_HOME / "task_calls")
        os.environ["AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST"] = bundles(FOLDERS)
        use_emulator(emulator.environment)
        subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True)
        calls = count_airflow_calls()
        dags = {dag_id: dag for folder in FOLDERS for dag_id, dag in load(folder).items()}

        table = Table(
            *("run", Column("tasks", justify="right"), Column("queries", justify="right")),
            *(Column(name, justify="right") for name in ("Polars Cloud", "Airflow", "seconds")),
            box=None,
        )
        from polars_remote.waiting import deferral

        nothing = min(measure(emulator, calls, dags["does_nothing"])[3] for _ in range(3))

        def add(name: str, dag: Any, tasks: int = 1) -> None:
            console.print(f"{name} ...")
            queries, cloud, airflow, seconds = measure(emulator, calls, dag)
            beyond = seconds - nothing
            table.add_row(
                *(name, str(tasks), str(queries), str(cloud), str(airflow), f"{beyond:.1f}")
            )

        measure(emulator, calls, dags["plain"])  # the imports
        emulator.reset()
        add("plain, cold", dags["plain"])
        emulator.reset()
        measure(emulator, calls, dags["left_running"])
        add("plain, warm", dags["left_running"])
        emulator.reset()
        deferral.IN_WORKER_SECONDS = 0.0
        deferral.SHORTEST_RESUME_DELAY = 0.0  # there is no scheduler that must see the worker exit
        emulator.add_fault("SubmitQuery", "query_takes", seconds=3)
        add("deferred, cold", dags["deferred"])
        deferral.IN_WORKER_SECONDS = 3.0
        for count in MAPPED:
            emulator.reset()
            add(f"{count} mapped", dags[f"mapped_{count}"], count)
        emulator.reset()
        add(f"{QUERIES} queries in a task", dags["many_queries"])
        emulator.reset()
        add("published wiring, cold", dags["published_status_check"])
        console.print(table)


def load(path: Path) -> dict[str, Any]:
    """Return the DAGs of a folder, by id."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(path)
    if bag.import_errors:
        raise RuntimeError(bag.import_errors)
    return bag.dags


def count_airflow_calls() -> Counter[str]:
    """Return a counter of the messages that tasks of this process send to Airflow from now on."""
    from airflow.sdk.execution_time.supervisor import InProcessSupervisorComms

    calls: Counter[str] = Counter()
    send: Callable[..., Any] = InProcessSupervisorComms.send

    def count(self: Any, msg: Any) -> Any:
        calls[type(msg).__name__] += 1
        return send(self, msg)

    InProcessSupervisorComms.send = count  # type: ignore[method-assign]
    return calls


def measure(
    emulator: RunningEmulator, calls: Counter[str], dag: Any
) -> tuple[int, int, int, float]:
    """Run the DAG; return queries, calls to Polars Cloud and to Airflow, and idle seconds."""
    calls.clear()
    cloud_before, known = len(emulator.journal()), len(emulator.state()["queries"])
    began = time.monotonic()
    run = dag.test()
    seconds = time.monotonic() - began
    if run.state != "success":
        raise RuntimeError(f"{dag.dag_id}: {run.state}")
    eventually(lambda: all(each["ended_at"] for each in emulator.state()["queries"]))
    queries = emulator.state()["queries"][known:]
    cloud = len(emulator.journal()) - cloud_before
    airflow = sum(count for name, count in calls.items() if name in RECORD)
    return len(queries), cloud, airflow, seconds - busy_seconds(queries)


def busy_seconds(queries: list[dict[str, Any]]) -> float:
    """Return the seconds in which at least one query ran."""
    from datetime import datetime

    spans = sorted(
        (datetime.fromisoformat(each["started_at"]), datetime.fromisoformat(each["ended_at"]))
        for each in queries
    )
    seconds, until = 0.0, None
    for begin, end in spans:
        if until is None or end > until:
            seconds += (end - (begin if until is None else max(begin, until))).total_seconds()
            until = end
    return seconds


if __name__ == "__main__":
    main()
