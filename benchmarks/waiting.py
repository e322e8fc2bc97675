"""Compare the cost of waiting for many queries, in plain and in deferred tasks.

Each task submits one query to a shared cluster and waits until it ends, under Airflow's scheduler
with 4 slots. A `@task` waits in its worker; a `@query_task` is deferred.
"""

import argparse
import contextlib
import json
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Column, Table

from local_airflow import use_airflow

_airflow_home = tempfile.TemporaryDirectory(prefix="airflow-home-")
use_airflow(Path(_airflow_home.name))  # before the first import of Airflow

from tests.failures.deployment import TRIGGERER, Deployment, Run, running_deployment  # noqa: E402

SLOTS = 4
WARM_UP = 2
"""Number of queries of a first run, which is not reported and loads all modules."""

SAMPLE_SECONDS = 3.0
PLAIN, DEFERRED = "plain", "deferred"
CASES = [
    *((DEFERRED, count, seconds) for seconds in (2, 30) for count in (10, 50, 200)),
    *((DEFERRED, count, 300) for count in (50, 200)),
    *((PLAIN, count, 2) for count in (10, 50, 200)),
    (PLAIN, 10, 30),
]
TOO_LONG = [
    (PLAIN, 50, 30),
    (PLAIN, 200, 30),
    (PLAIN, 10, 300),
    (PLAIN, 50, 300),
    (PLAIN, 200, 300),
]

SOURCE = """
from datetime import datetime, timedelta
from airflow.sdk import dag, task
from include.auth import authenticate
from polars_remote import query_task, shared_cluster, use_cluster

CLUSTER = {{"name": "airflow-{dag_id}", "cpus": 2, "memory": 4, "idle_timeout_mins": 60}}

@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    max_active_tasks=1000,
    default_args={{"retries": 2, "retry_delay": timedelta(seconds=1)}},
)
def {dag_id}():
    @{decorator}
    @authenticate
    def ask(number):
        import polars as pl

        query = pl.LazyFrame({{"number": [number]}})
        with use_cluster(CLUSTER) as ctx:
            return {wait}

    with shared_cluster(CLUSTER):
        ask.expand(number=list(range({count})))

{dag_id}()
"""
WAYS = {
    PLAIN: ("task", "query.remote(ctx).execute().location"),
    DEFERRED: ("query_task", "query.remote(ctx).execute(blocking=False)"),
}

NOTE = """
Held at once: maximum number of queries that ran at the same time. The next columns were measured
then. Slots while held: of 4; 0 if at some time all queries were held and no task process ran. Task
processes: maximum at any time, without their supervisor processes. MB a query: increase of
Airflow's memory (PSS) since before the run; only of the triggerer if no task process ran. Polls a
minute: status requests for each query. Noticed after, ended after: seconds from a query's end until
its trigger fired, and until its task ended. The queries end at about the same time, and their tasks
take turns in the slots.
"""


@dataclass
class Watch:
    """Measurements of Airflow's processes during a run."""

    processes: int = 0
    most_held: int = 0
    held_without_process: bool = False
    memory: float = 0.0
    triggerer_memory: float = 0.0
    polls: list[float] = field(default_factory=list)
    triggerer_cpu: list[float] = field(default_factory=list)


def name(way: str, count: int) -> str:
    return f"{way}_{count}"


def dags() -> dict[str, str]:
    cases = {
        (way, count) for way, count, _ in [*CASES, (PLAIN, WARM_UP, 0), (DEFERRED, WARM_UP, 0)]
    }
    return {
        name(way, count): SOURCE.format(
            dag_id=name(way, count), decorator=WAYS[way][0], wait=WAYS[way][1], count=count
        )
        for way, count in cases
    }


def pss(processes: Iterable[psutil.Process]) -> float:
    """Return the memory of these processes and their descendants, in MB."""
    used = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    used += each.memory_full_info().pss / 1e6
    return used


def cpu_seconds(process: psutil.Process) -> float:
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def sample(airflow: Deployment, watch: Watch, over: threading.Event) -> None:
    """Measure Airflow's processes every `SAMPLE_SECONDS`, until `over` is set."""
    triggerer = airflow.processes[TRIGGERER]
    cpu = cpu_seconds(triggerer)
    while not over.wait(SAMPLE_SECONDS):
        now = datetime.now(UTC) - timedelta(seconds=SAMPLE_SECONDS)
        held = len(airflow.emulator.running_queries())
        polls = sum(
            call["path"].endswith("GetQueryStatus") and datetime.fromisoformat(call["at"]) >= now
            for call in airflow.emulator.api.journal()
        )
        cpu, before = cpu_seconds(triggerer), cpu
        watch.processes = max(watch.processes, airflow.count_task_processes())
        if held >= watch.most_held and held:
            watch.most_held = held
            watch.memory = pss(airflow.processes.values())
            watch.triggerer_memory = pss([triggerer])
            watch.held_without_process |= not airflow.count_task_processes()
            watch.polls.append(polls / held / SAMPLE_SECONDS * 60)
            watch.triggerer_cpu.append((cpu - before) / SAMPLE_SECONDS * 100)


def noticed_at(run: Run) -> dict[int, datetime]:
    """Return when the trigger of each mapped task noticed the end of its query."""
    noticed = {}
    for path in run.logs("ask"):
        for line in path.read_text().splitlines():
            if '"Trigger fired event"' in line:
                event = json.loads(line)
                noticed[event["map_index"]] = datetime.fromisoformat(event["timestamp"])
    return noticed


def measure(airflow: Deployment, way: str, count: int, seconds: float) -> tuple[str, ...]:
    """Run one case; return its row of the table."""
    airflow.end_runs()
    airflow.emulator.api.add_fault("SubmitQuery", "query_waits", seconds=seconds, times=count)
    base, base_of_triggerer = pss(airflow.processes.values()), pss([airflow.processes[TRIGGERER]])
    watch, over = Watch(), threading.Event()
    sampling = threading.Thread(target=sample, args=(airflow, watch, over))
    sampling.start()
    try:
        run = airflow.trigger(name(way, count))
        run.wait_for_end()
    finally:
        over.set()
        sampling.join()
    assert run.state == "success", run.log()[-3000:]

    ended = {}
    for query in airflow.emulator.queries():
        [index] = [label for label in query["labels"] if label.startswith("map=")]
        ended[int(index.removeprefix("map="))] = datetime.fromisoformat(query["ended_at"])
    tasks = run.ends("ask")
    notices = noticed_at(run)
    lags = sorted((tasks[index] - ended[index]).total_seconds() for index in ended)
    notice = sorted((notices[index] - ended[index]).total_seconds() for index in notices)
    held = max(watch.most_held, 1)
    own = watch.triggerer_memory - base_of_triggerer
    beyond = own if way == DEFERRED and watch.held_without_process else watch.memory - base
    took = run.seconds() / 60
    retried = sum(number - 1 for number in run.try_numbers("ask"))
    return (
        way,
        str(count),
        f"{seconds:.0f}",
        str(watch.most_held),
        "0" if watch.held_without_process else str(min(watch.processes, SLOTS)),
        str(watch.processes),
        f"{beyond / held:.1f}",
        f"{median(watch.triggerer_cpu):.0f}" if watch.triggerer_cpu else "",
        f"{median(watch.polls):.0f}" if watch.polls else "",
        f"{median(notice):.1f}, {notice[-1]:.1f}" if notice else "in the worker",
        f"{median(lags):.1f}, {lags[-1]:.1f}",
        f"{took:.1f}",
        str(retried),
    )


def main(at_most: int) -> None:
    """Measure each case with at most `at_most` queries, and print the table."""
    table = Table(
        "tasks",
        *(
            Column(title, justify="right")
            for title in (
                "queries",
                "seconds of a query",
                "held at once",
                "slots while held",
                "task processes",
                "MB a query",
                "triggerer CPU %",
                "polls a minute",
                "noticed after s: median, worst",
                "ended after s: median, worst",
                "run min",
                "retried",
            )
        ),
        title=f"Waiting under Airflow's scheduler with {SLOTS} slots",
    )
    with (
        tempfile.TemporaryDirectory(prefix="waiting-") as folder,
        running_deployment(Path(folder), dags(), slots=SLOTS, options={}) as airflow,
    ):
        airflow.patience = 3600.0
        for way in (PLAIN, DEFERRED):
            measure(airflow, way, WARM_UP, 15.0)
        for case in CASES:
            if case[1] <= at_most:
                row = measure(airflow, *case)
                print(*row, sep=" | ", flush=True)
                table.add_row(*row)
    for way, count, seconds in TOO_LONG:
        least = count / SLOTS * seconds / 60
        table.add_row(way, str(count), str(seconds), *[""] * 8, f"at least {least:.0f}", "")
    console = Console(width=150)
    console.print(table)
    print(NOTE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-most", type=int, default=200, help="maximum queries of a case")
    main(**vars(parser.parse_args()))
