"""Run DAGs on an emulator, and show their results or errors."""

import argparse
import contextlib
import inspect
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Column, Table

from local_airflow import (
    PATTERNS,
    ROOT,
    airflow_output_in,
    find_dag_file,
    get_function,
    shorten,
    use_airflow,
    use_emulator,
)
from polars_cloud_emulator.model.workspace import DATA_BUCKET, TEMPORARY_BUCKET
from polars_cloud_emulator.testing import RunningEmulator, running_emulator

if TYPE_CHECKING:
    from airflow.sdk import DAG, Context
    from rich.console import Console

AIRFLOW_HOME = ROOT / ".airflow"
LOG = AIRFLOW_HOME / "demo.log"
DATABASE = AIRFLOW_HOME / "airflow.db"
MIGRATED = AIRFLOW_HOME / f"migrated-to-{version('apache-airflow-core')}"
"""Exists after this Airflow has migrated the database, because a check would take seconds."""
QUERY_TIMEOUT = 60.0
"""Maximum seconds to wait for detached queries."""
ROWS = 5
"""Default number of rows to show of each result if DAGs are named."""
PLAN = "\n\nResolved plan until failure:"
"""Start of the plan in a Polars error. The plan is only in the log."""


class Failure(NamedTuple):
    """A failed task, or a DAG that could not begin, and the exception."""

    name: str
    function: FunctionType | None
    error: BaseException


def ended_queries(emulator: RunningEmulator, known: set[str]) -> list[dict[str, Any]]:
    """Wait until all queries have ended, and return those whose ids are not known."""
    deadline = time.monotonic() + QUERY_TIMEOUT
    while True:
        queries = [query for query in emulator.state()["queries"] if query["id"] not in known]
        if all(query["ended_at"] for query in queries) or time.monotonic() > deadline:
            return queries
        time.sleep(0.1)


def billed(emulator: RunningEmulator, queries: list[dict[str, Any]]) -> str:
    """Return the vCPU-hours of the queries' clusters so far, and of the idle timeout to come."""
    used = {query["cluster_id"] for query in queries}
    clusters = [cluster for cluster in emulator.state()["clusters"] if cluster["id"] in used]
    hours = sum(each["vcpus"] * each["billed_seconds"] / 3600 for each in clusters)
    idle = sum(
        each["vcpus"] * each["idle_timeout_mins"] / 60
        for each in clusters
        if not each["stopped_at"]
    )
    return f"{hours:.4f}" + (f"+{idle:.4f} idle" if idle else "")


def run_once(dag: "DAG") -> tuple[str, list[Failure]]:
    """Run a DAG without retries. Return the run's state, and the tasks that failed."""
    failures: list[Failure] = []

    def add_failure(context: "Context") -> None:
        error = context["exception"]
        assert isinstance(error, BaseException)
        task, index = context["task"], context["ti"].map_index
        name = name_task(task.task_id, None if index == -1 else index)
        failures.append(Failure(name, get_function(task), error))

    for task in dag.tasks:
        task.retries = 0
        callbacks = task.on_failure_callback or []
        others = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
        task.on_failure_callback = [*others, add_failure]
    try:
        return str(dag.test().state), failures
    except Exception as error:  # such as that of a param without a default
        return "failed", [*failures, Failure(dag.dag_id, None, error)]


def find_place(failure: Failure, dag_file: Path) -> str:
    """Return the line of the DAG's file at which a task has failed, or the task's first line."""
    frames = traceback.extract_tb(failure.error.__traceback__)
    # A query that the task has returned fails outside of the file.
    code = inspect.unwrap(failure.function).__code__ if failure.function else None
    places = [(code.co_filename, code.co_firstlineno)] if code else []
    places += [(frame.filename, frame.lineno or 0) for frame in frames]
    lines = [line for file, line in places if file == str(dag_file)]
    return f"{dag_file.relative_to(ROOT)}" + (f", line {lines[-1]}" if lines else "")


def describe_error(error: BaseException) -> str:
    """Return an exception's type, message and notes, without a traceback or plan."""
    text = "".join(traceback.format_exception_only(error))
    notes = getattr(error, "__notes__", ()) if PLAN in text else ()
    return "\n".join([text.partition(PLAN)[0].rstrip(), *notes])


def name_task(task_id: str, map_index: int | str | None) -> str:
    """Name a task, with its map index if it is mapped."""
    return task_id if map_index is None else f"{task_id}[{map_index}]"


def get_task(query: dict[str, Any]) -> str:
    """Return the task that has submitted a query, with its map index if it is mapped.

    A query on a context of the user's own has no such labels: it is named by its id.
    """
    parts = (label.partition("=") for label in query["labels"])
    labels: dict[str, str] = {key: value for key, _, value in parts}
    return name_task(labels.get("task", f"query {query['id'][:8]}"), labels.get("map"))


def describe(uri: str) -> str:
    """Return the path of a query's result in the bucket of the sample data."""
    return (
        "a temporary result"
        if TEMPORARY_BUCKET in uri
        else uri.removeprefix(f"s3://{DATA_BUCKET}/")
    )


def show_rows(console: "Console", query: dict[str, Any], count: int) -> None:
    """Print the first rows of each result of a query."""
    import polars as pl

    scans: dict[str, Callable[[str], pl.LazyFrame]] = {
        ".csv": pl.scan_csv,
        ".ndjson": pl.scan_ndjson,
        ".arrow": pl.scan_ipc,
    }
    for uri in query["destinations"]:
        rows = query["n_rows"]
        console.print(
            f"\n  [{'bold' if rows else 'yellow'}]{get_task(query)}[/] wrote {rows:,} rows: "
            f"{describe(uri)}"
        )
        if not rows:
            continue
        try:
            frame = scans.get(Path(uri).suffix, pl.scan_parquet)(uri).head(count).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            print_below(console, f"The rows cannot be shown: {error}")
            continue
        with pl.Config(
            tbl_rows=count,
            tbl_cols=-1,
            tbl_width_chars=console.width - 2,
            tbl_hide_dataframe_shape=True,
        ):
            print_below(console, str(frame))


def print_below(console: "Console", text: str) -> None:
    """Print lines as they are, indented."""
    console.print(textwrap.indent(text, "  "), markup=False, soft_wrap=True)


def main(dag_ids: list[str], stay: bool, realistic: bool, rows: int) -> int:
    """Run the DAGs; return the exit code, 1 after a failure.

    Parameters
    ----------
    dag_ids
        Ids of the DAGs to run; all patterns if empty.
    stay
        Whether to serve the emulator and its page afterwards, until Ctrl-C.
    realistic
        Whether the emulator has realistic delays and expiry.
    rows
        Number of rows to show of each result.
    """
    with airflow_output_in(LOG) as console, contextlib.ExitStack() as started:
        console.print("Starting Airflow and the emulator ...")
        use_airflow(AIRFLOW_HOME)
        migration = None
        if not (MIGRATED.exists() and DATABASE.exists()):
            # At the same time as the emulator's start and Airflow's import below.
            migration = subprocess.Popen([sys.executable, "-m", "airflow", "db", "migrate"])

        def stop(*_: object) -> None:
            # A migration that is interrupted would leave a database that cannot be used.
            if migration:
                migration.wait()
            os._exit(1)

        signal.signal(signal.SIGTERM, stop)
        emulator = started.enter_context(running_emulator(realistic=realistic))
        use_emulator(emulator.environment)
        console.print(f"Airflow's log: {LOG.relative_to(ROOT)}\nEmulator: {emulator.rest_url}")

        from airflow.dag_processing.dagbag import DagBag

        dags: dict[str, DAG] = {}
        failures = 0
        for file in (find_dag_file(dag_id) for dag_id in dag_ids or PATTERNS):
            dag_bag = DagBag(file)
            dags |= dag_bag.dags
            problem = "" if dag_bag.dags else "It defines no DAG: call its function at the end"
            for error in dag_bag.import_errors.values() or filter(None, [problem]):
                failures += 1
                console.print(f"\n{file.relative_to(ROOT)}", style="red")
                print_below(console, shorten(error))
        if migration:
            if migration.wait():
                console.print(f"The migration of Airflow's database failed: see {LOG}", style="red")
                return 1
            MIGRATED.touch()

        table = Table(
            *("DAG", "Seconds", "vCPU-hours"),
            Column("Rows", justify="right"),
            Column("Written", overflow="fold"),
            box=None,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        known: set[str] = set()
        for dag_id, dag in dags.items():
            console.print(f"{dag_id} ...", end=" ")
            start = time.monotonic()
            state, failed = run_once(dag)
            seconds = f"{time.monotonic() - start:.1f}"
            queries = ended_queries(emulator, known)
            known |= {query["id"] for query in queries}
            succeeded = state == "success" and all(q["status"] == "Success" for q in queries)
            failures += not succeeded
            count = f"{len(queries)} {'query' if len(queries) == 1 else 'queries'}"
            console.print(f"{state}, {count}, {seconds} s")
            for failure in failed:
                place = find_place(failure, Path(dag.fileloc))
                console.print(f"\n  {failure.name} failed: {place}", style="red")
                print_below(console, describe_error(failure.error))
            for query in queries:
                if query["status"] == "Success" and rows:
                    show_rows(console, query, rows)
                elif query["status"] != "Success" and state == "success":
                    console.print(f"\n  A query of {get_task(query)} failed", style="red")
                    print_below(console, (query["error"] or query["status"]).partition(PLAN)[0])
            summary = [
                f"[{'green' if succeeded else 'red'}]{dag_id}",
                seconds,
                billed(emulator, queries),
            ]
            written = [
                (str(q["n_rows"] or "[yellow]0"), describe(uri), get_task(q))
                for q in queries
                for uri in q["destinations"]
            ]
            named = len({task for *_, task in written}) > 1
            for n_rows, uri, task in written or [("", "", "")]:
                table.add_row(*summary, n_rows, f"{task}: {uri}" if named else uri)
                summary = [""] * len(summary)
        console.print()
        console.print(table)
        if failures:
            console.print(f"\nComplete log of the tasks: {LOG.relative_to(ROOT)}")
        if stay:
            console.print(f"\nPage with the clusters, until Ctrl-C: {emulator.rest_url}")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        else:
            chosen = f" DAG={shlex.quote(' '.join(dag_ids))}" if dag_ids else ""
            console.print(f"\nTo see the clusters in a browser: make demo OPEN=1{chosen}")
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dag_ids", nargs="*", metavar="DAG")
    parser.add_argument("--open", action="store_true", dest="stay")
    parser.add_argument("--realistic", action="store_true")
    parser.add_argument("--rows", type=int)
    arguments = parser.parse_args()
    for dag_id in arguments.dag_ids:
        find_dag_file(dag_id)
    if arguments.rows is None:
        arguments.rows = ROWS if arguments.dag_ids else 0
    sys.exit(main(**vars(arguments)))
