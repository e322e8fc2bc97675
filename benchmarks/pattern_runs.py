"""Run the DAGs and their counterparts of `published_wiring/`, each on an emulator as new."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from demo import AIRFLOW_HOME, LOG, ended_queries
from local_airflow import PATTERNS, ROOT, airflow_output_in, use_airflow, use_emulator
from polars_cloud_emulator.testing import RunningEmulator, running_emulator

if TYPE_CHECKING:
    from airflow.sdk import DAG

DAGS = [ROOT / "dags", ROOT / "benchmarks" / "published_wiring"]
PUBLISHED = "published_"
STOP_TIMEOUT_S = 60.0


class Patterns(NamedTuple):
    """What a benchmark works with."""

    emulator: RunningEmulator
    console: Console
    pairs: dict[str, tuple["DAG", "DAG"]]
    """Each DAG and its counterpart, by the DAG's id."""


class Run(NamedTuple):
    """What the emulator's state says after a run: each query has ended, each cluster stopped."""

    clusters: list[dict[str, Any]]
    queries: list[dict[str, Any]]


@contextlib.contextmanager
def patterns() -> Iterator[Patterns]:
    """Start an emulator, and load the DAGs so that each task has one try."""
    with running_emulator() as emulator, airflow_output_in(LOG) as console:
        use_airflow(AIRFLOW_HOME / "cluster_cost")  # whose DAGs are not those of the others
        os.environ["AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST"] = bundles(DAGS)
        use_emulator(emulator.environment)
        subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True)
        console.print(f"Airflow's log in {LOG.relative_to(ROOT)}")

        from airflow.dag_processing.dagbag import DagBag

        log_in(emulator)
        ours, published = (DagBag(folder).dags for folder in DAGS)
        for dag in (*ours.values(), *published.values()):
            for task in dag.tasks:
                task.retries = 0
        pairs = {dag_id: (ours[dag_id], published[PUBLISHED + dag_id]) for dag_id in PATTERNS}
        yield Patterns(emulator, console, pairs)


def log_in(emulator: RunningEmulator) -> None:
    """Log this process in, which is the one that runs the tasks."""
    import polars_cloud as pc

    pc.authenticate(
        client_id=emulator.environment["POLARS_CLOUD_CLIENT_ID"],
        client_secret=emulator.environment["POLARS_CLOUD_CLIENT_SECRET"],
        interactive=False,
    )


def make_ready(emulator: RunningEmulator, dag: "DAG") -> None:
    """Reset the emulator to what the DAG expects; faults are added after this."""
    emulator.reset()
    if dag.dag_id.startswith(PUBLISHED):
        _register_manifest()


def run_to_its_end(emulator: RunningEmulator, dag: "DAG", failure: str | None = None) -> Run:
    """Run the DAG, and wait until its queries have ended and its clusters have stopped.

    The clock is moved to each idle timeout, so that what is left running is billed to its end.

    Parameters
    ----------
    failure
        Error of the one query that is to fail; None if all are to succeed.
    """
    run = dag.test()
    queries = ended_queries(emulator, set())
    failed = [query["error"] for query in queries if query["status"] != "Success"]
    if failed != ([failure] if failure else []) or not (failure or run.state == "success"):
        raise RuntimeError(f"{dag.dag_id}: {run.state}, with queries that failed: {failed}")
    return Run(_stopped_clusters(emulator), queries)


def idle_seconds(cluster: dict[str, Any]) -> float:
    """Seconds that the cluster was billed for waiting until its idle timeout."""
    if cluster["termination_reason"] != "StoppedInactive":
        return 0.0
    minutes: float = cluster["idle_timeout_mins"]
    return 60 * minutes


def bundles(folders: Iterable[Path]) -> str:
    """Return folders as Airflow's configuration takes them: `dag.test()` looks nowhere else."""
    local = "airflow.dag_processing.bundles.local.LocalDagBundle"
    return json.dumps(
        [
            {"name": folder.name, "classpath": local, "kwargs": {"path": str(folder)}}
            for folder in folders
        ]
    )


def _register_manifest() -> None:
    """Do what the published wiring leaves to somebody, once, outside the DAGs."""
    import polars_cloud as pc

    from include.shop import MANIFEST
    from polars_remote.settings import WORKSPACE

    pc.ComputeContext(workspace=WORKSPACE, cpus=2, memory=4, cluster_size=3).register(MANIFEST)


def _idle_until(cluster: dict[str, Any], queries: list[dict[str, Any]]) -> datetime:
    ends = [query["ended_at"] for query in queries if query["cluster_id"] == cluster["id"]]
    idle_since = datetime.fromisoformat(max([cluster["requested_at"], *ends]))
    return idle_since + timedelta(minutes=cluster["idle_timeout_mins"])


def _stopped_clusters(emulator: RunningEmulator) -> list[dict[str, Any]]:
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
            first = min(_idle_until(cluster, state["queries"]) for cluster in idle)
            # No further: what is billed ends when the emulator looks, not when it was due.
            emulator.advance_clock(max(first - now, timedelta(0)))
        time.sleep(0.1)
    raise TimeoutError(f"clusters are running after {STOP_TIMEOUT_S:.0f} s: {clusters}")
