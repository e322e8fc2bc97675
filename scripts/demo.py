"""Run the eight DAGs against an emulator, one after the other, and show what they did."""

import argparse
import contextlib
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

from rich.table import Column, Table

from local_airflow import PATTERNS, ROOT, airflow_output_in, use_airflow, use_emulator
from polars_cloud_emulator.model.workspace import DATA_BUCKET, TEMPORARY_BUCKET
from polars_cloud_emulator.testing import RunningEmulator, running_emulator

AIRFLOW_HOME = ROOT / ".airflow"
LOG = AIRFLOW_HOME / "demo.log"
DATABASE = AIRFLOW_HOME / "airflow.db"
MIGRATED = AIRFLOW_HOME / f"migrated-to-{version('apache-airflow-core')}"
"""There once this Airflow has migrated the database: to look again would take seconds."""
QUERY_TIMEOUT = 60.0
"""Seconds for the query that nobody waits for."""


def ended_queries(emulator: RunningEmulator, known: set[str]) -> list[dict[str, Any]]:
    """Queries that are not among the known ones, once all of them have ended."""
    deadline = time.monotonic() + QUERY_TIMEOUT
    while True:
        queries = [query for query in emulator.state()["queries"] if query["id"] not in known]
        if all(query["ended_at"] for query in queries) or time.monotonic() > deadline:
            return queries
        time.sleep(0.1)


def billed(emulator: RunningEmulator, queries: list[dict[str, Any]]) -> str:
    """vCPU-hours of the queries' clusters, and those still to come while they idle."""
    used = {query["cluster_id"] for query in queries}
    clusters = [cluster for cluster in emulator.state()["clusters"] if cluster["id"] in used]
    hours = sum(each["vcpus"] * each["billed_seconds"] / 3600 for each in clusters)
    idle = sum(
        each["vcpus"] * each["idle_timeout_mins"] / 60
        for each in clusters
        if not each["stopped_at"]
    )
    return f"{hours:.4f}" + (f"+{idle:.4f} idle" if idle else "")


def describe(uri: str) -> str:
    """Name what a query wrote, below the bucket of the sample data."""
    return (
        "a temporary result"
        if TEMPORARY_BUCKET in uri
        else uri.removeprefix(f"s3://{DATA_BUCKET}/")
    )


def main(dag_ids: list[str], stay: bool, realistic: bool) -> int:
    """Run the DAGs; the exit code.

    Parameters
    ----------
    dag_ids
        Those to run; all if there are none.
    stay
        Whether the emulator is served on, with its page, until Ctrl-C.
    realistic
        Whether the emulator is as slow and forgetful as a cloud.
    """
    with airflow_output_in(LOG) as console, contextlib.ExitStack() as started:
        console.print("Starting Airflow and the emulator ...")
        use_airflow(AIRFLOW_HOME)
        migration = None
        if not (MIGRATED.exists() and DATABASE.exists()):
            # Beside the start of the emulator, and Airflow's import below.
            migration = subprocess.Popen([sys.executable, "-m", "airflow", "db", "migrate"])
        emulator = started.enter_context(running_emulator(realistic=realistic))
        use_emulator(emulator.environment)
        console.print(f"Airflow's log: {LOG.relative_to(ROOT)}\nEmulator: {emulator.rest_url}")

        from airflow.dag_processing.dagbag import DagBag

        dag_bag = DagBag()
        for path, error in dag_bag.import_errors.items():
            console.print(f"{path}: {error}", style="red")
        if missing := set(dag_ids) - dag_bag.dags.keys():
            console.print(f"No DAG {', '.join(sorted(missing))} in dags/", style="red")
            return 1
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
        failures = len(dag_bag.import_errors)
        for dag_id in dag_ids or PATTERNS:
            console.print(f"{dag_id} ...", end=" ")
            start = time.monotonic()
            run = dag_bag.dags[dag_id].test()
            seconds = f"{time.monotonic() - start:.1f}"
            queries = ended_queries(emulator, known)
            known |= {query["id"] for query in queries}
            succeeded = run.state == "success" and all(q["status"] == "Success" for q in queries)
            failures += not succeeded
            console.print(f"{run.state}, {len(queries)} queries, {seconds} s")
            summary = [
                f"[{'green' if succeeded else 'red'}]{dag_id}",
                seconds,
                billed(emulator, queries),
            ]
            written = [
                (str(q["n_rows"]), describe(uri)) for q in queries for uri in q["destinations"]
            ]
            for cells in written or [("", "")]:
                table.add_row(*summary, *cells)
                summary = [""] * len(summary)
        console.print(table)
        if stay:
            console.print(f"\nWhat each cluster did, until Ctrl-C: {emulator.rest_url}")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        else:
            console.print("\nWhat each cluster did, in a browser: make demo OPEN=1")
    return 1 if failures or not known else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dag_ids", nargs="*", metavar="DAG")
    parser.add_argument("--open", action="store_true", dest="stay")
    parser.add_argument("--realistic", action="store_true")
    sys.exit(main(**vars(parser.parse_args())))
