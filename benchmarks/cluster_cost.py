"""What each pattern costs: cluster-seconds billed over query-seconds used, beside the published.

Runs each of the eight DAGs and its counterpart of `published_wiring/`, which asks the same queries,
once with every query succeeding and once with the last one failing and no retries. The emulator's
clock is then moved to each idle timeout, so that what is left running is billed to its end.
"""

import json
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from demo import AIRFLOW_HOME, LOG, airflow_output_in_log, ended_queries
from local_airflow import ROOT, use_airflow, use_emulator
from polars_cloud_emulator.testing import RunningEmulator, running_emulator

if TYPE_CHECKING:
    from airflow.sdk import DAG

DAGS = [ROOT / "dags", ROOT / "benchmarks" / "published_wiring"]
PUBLISHED = "published_"
STOP_TIMEOUT_S = 60.0
FAILURE = "ComputeError: this query was to fail"

NOTE = """
Billed are the seconds from a cluster's request to its stop, however many its nodes. Those marked
"idle" are its idle timeout, which passed on the emulator's clock: the same in each run. All others,
and those of the queries, are real seconds, with small queries and one task at a time: they vary
from run to run, and much of what is billed is Airflow between two tasks. Where neither idles,
published / ours therefore says little. Worker processes that start count as the first query's
seconds, unless the cluster was started before. Queries that ran side by side count each.
Ratio: seconds billed over those of the queries. Published / ours: of what is billed.
"""


class Cost(NamedTuple):
    """Of one run of a DAG, in seconds."""

    busy: float
    """Billed, but for the idle timeout."""
    idle: float
    """Billed for waiting until the idle timeout."""
    queries: list[float]

    @property
    def billed(self) -> float:
        return self.busy + self.idle

    def cells(self) -> tuple[str, str, str]:
        used = sum(self.queries)
        idle = f" + {self.idle:.0f} idle" if self.idle else ""
        return f"{self.busy:.1f}{idle}", f"{used:.1f}", f"{self.billed / used:,.1f}"


def dag_bundles() -> str:
    """Both folders as Airflow's configuration takes them: `dag.test()` looks nowhere else."""
    local = "airflow.dag_processing.bundles.local.LocalDagBundle"
    return json.dumps(
        [
            {"name": folder.name, "classpath": local, "kwargs": {"path": str(folder)}}
            for folder in DAGS
        ]
    )


def register_manifest() -> None:
    """Do what the published wiring leaves to somebody, once, outside the DAGs."""
    import polars_cloud as pc

    from include.settings import MANIFEST, WORKSPACE

    pc.ComputeContext(workspace=WORKSPACE, cpus=2, memory=4, cluster_size=3).register(MANIFEST)


def idle_until(cluster: dict[str, Any], queries: list[dict[str, Any]]) -> datetime:
    ends = [query["ended_at"] for query in queries if query["cluster_id"] == cluster["id"]]
    idle_since = datetime.fromisoformat(max([cluster["requested_at"], *ends]))
    return idle_since + timedelta(minutes=cluster["idle_timeout_mins"])


def stopped_clusters(emulator: RunningEmulator) -> list[dict[str, Any]]:
    """All clusters, once the clock was moved to the idle timeout of those that were running."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        state = emulator.state()
        clusters: list[dict[str, Any]] = state["clusters"]
        if all(cluster["stopped_at"] for cluster in clusters):
            return clusters
        idle = [cluster for cluster in clusters if cluster["status"] == "Idle"]
        if idle:
            now = emulator.advance_clock(timedelta(0))
            first = min(idle_until(cluster, state["queries"]) for cluster in idle)
            # No further: what is billed ends when the emulator looks, not when it was due.
            emulator.advance_clock(max(first - now, timedelta(0)))
        time.sleep(0.1)
    raise TimeoutError(f"clusters are running after {STOP_TIMEOUT_S:.0f} s: {clusters}")


def measure(emulator: RunningEmulator, dag: "DAG", failing: int | None = None) -> Cost:
    """Run the DAG on an emulator as new; `failing` counts the queries to the one that fails."""
    emulator.reset()
    if dag.dag_id.startswith(PUBLISHED):
        register_manifest()
    if failing:
        emulator.add_fault("SubmitQuery", "query_fails", nth=failing, error=FAILURE)
    run = dag.test()
    queries = ended_queries(emulator, set())
    failed = [query["error"] for query in queries if query["status"] != "Success"]
    if failed != ([FAILURE] if failing else []) or not (failing or run.state == "success"):
        raise RuntimeError(f"{dag.dag_id}: {run.state}, with queries that failed: {failed}")
    clusters = stopped_clusters(emulator)
    idle = sum(
        60 * cluster["idle_timeout_mins"]
        for cluster in clusters
        if cluster["termination_reason"] == "StoppedInactive"
    )
    billed = sum(cluster["billed_seconds"] for cluster in clusters)
    return Cost(billed - idle, idle, [query["seconds"] for query in queries])


def report(console: Console, title: str, costs: dict[str, tuple[Cost, Cost]]) -> None:
    table = Table(
        Column("Pattern"),
        *(
            Column(header, justify="right")
            for header in (
                *("Ours: billed", "queries", "ratio"),
                *("Published: billed", "queries", "ratio"),
                "Published / ours",
            )
        ),
        title=title,
        title_justify="left",
    )
    for dag_id, (ours, published) in costs.items():
        table.add_row(
            dag_id, *ours.cells(), *published.cells(), f"{published.billed / ours.billed:,.1f}"
        )
    console.print(table)


def main() -> None:
    with running_emulator() as emulator, airflow_output_in_log() as console:
        use_airflow(AIRFLOW_HOME / "cluster_cost")  # whose DAGs are not those of the others
        os.environ["AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST"] = dag_bundles()
        use_emulator(emulator.environment)
        subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True)
        console.print(f"Airflow's log in {LOG.relative_to(ROOT)}")

        import polars_cloud as pc
        from airflow.dag_processing.dagbag import DagBag

        pc.authenticate(
            client_id=emulator.environment["POLARS_CLOUD_CLIENT_ID"],
            client_secret=emulator.environment["POLARS_CLOUD_CLIENT_SECRET"],
            interactive=False,
        )
        ours, published = (DagBag(folder).dags for folder in DAGS)
        for dag in (*ours.values(), *published.values()):
            for task in dag.tasks:
                task.retries = 0
        succeeding = {}
        failing = {}
        for dag_id in sorted(ours):
            console.print(f"{dag_id} ...")
            pair = ours[dag_id], published[PUBLISHED + dag_id]
            a, b = (measure(emulator, dag) for dag in pair)
            succeeding[dag_id] = a, b
            c, d = (measure(emulator, dag, len(a.queries)) for dag in pair)
            failing[dag_id] = c, d
        report(console, "Every query succeeds", succeeding)
        report(console, "The last query fails, without retries", failing)
        console.print(NOTE)


if __name__ == "__main__":
    main()
