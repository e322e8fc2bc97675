"""Run the DAGs and their counterparts in `published_wiring/`, each on a fresh emulator."""

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
    """Running emulator, console and DAGs for a benchmark."""

    emulator: RunningEmulator
    console: Console
    pairs: dict[str, tuple["DAG", "DAG"]]
    """Each DAG and its published counterpart, by the id of the DAG."""


class Run(NamedTuple):
    """Clusters and queries of the emulator after a run, when all of them have ended."""

    clusters: list[dict[str, Any]]
    queries: list[dict[str, Any]]


@contextlib.contextmanager
def patterns() -> Iterator[Patterns]:
    """Start an emulator, and load the DAGs without retries."""
    with running_emulator() as emulator, airflow_output_in(LOG) as console:
        use_airflow(AIRFLOW_HOME / "cluster_cost")  # a home of its own, as it has other DAGs
        os.environ["AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST"] = bundles(DAGS)
        use_emulator(emulator.environment)
        subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True)
        console.print(f"Airflow's log: {LOG.relative_to(ROOT)}")

        from airflow.dag_processing.dagbag import DagBag

        log_in(emulator)
        ours, published = (DagBag(folder).dags for folder in DAGS)
        for dag in (*ours.values(), *published.values()):
            for task in dag.tasks:
                task.retries = 0
        pairs = {dag_id: (ours[dag_id], published[PUBLISHED + dag_id]) for dag_id in PATTERNS}
        yield Patterns(emulator, console, pairs)


def log_in(emulator: RunningEmulator) -> None:
    """Log this process in. It runs the tasks."""
    import polars_cloud as pc

    pc.authenticate(
        client_id=emulator.environment["POLARS_CLOUD_CLIENT_ID"],
        client_secret=emulator.environment["POLARS_CLOUD_CLIENT_SECRET"],
        interactive=False,
    )


def make_ready(emulator: RunningEmulator, dag: "DAG") -> None:
    """Reset the emulator, and register the manifest that a published DAG expects."""
    emulator.reset()
    if dag.dag_id.startswith(PUBLISHED):
        _register_manifest()


def run_to_its_end(emulator: RunningEmulator, dag: "DAG", failure: str | None = None) -> Run:
    """Run the DAG, and wait until its queries have ended and its clusters have stopped.

    The emulator's clock is advanced to the idle timeout of each cluster that still runs.

    Parameters
    ----------
    failure
        Expected error of the one query that fails; None if all succeed.
    """
    run = dag.test()
    queries = ended_queries(emulator, set())
    failed = [query["error"] for query in queries if query["status"] != "Success"]
    if failed != ([failure] if failure else []) or not (failure or run.state == "success"):
        raise RuntimeError(f"{dag.dag_id}: {run.state}, failed queries: {failed}")
    return Run(_stopped_clusters(emulator), queries)


def idle_seconds(cluster: dict[str, Any]) -> float:
    """Return the billed seconds of the cluster's idle timeout."""
    if cluster["termination_reason"] != "StoppedInactive":
        return 0.0
    minutes: float = cluster["idle_timeout_mins"]
    return 60 * minutes


def bundles(folders: Iterable[Path]) -> str:
    """Return the setting for Airflow's DAG bundles, where `dag.test()` looks for DAG files."""
    local = "airflow.dag_processing.bundles.local.LocalDagBundle"
    return json.dumps(
        [
            {"name": folder.name, "classpath": local, "kwargs": {"path": str(folder)}}
            for folder in folders
        ]
    )


def _register_manifest() -> None:
    """Register the manifest, which the published DAGs expect to exist."""
    import polars_cloud as pc

    from include.shop import MANIFEST
    from polars_remote.settings import WORKSPACE

    pc.ComputeContext(workspace=WORKSPACE, cpus=2, memory=4, cluster_size=3).register(MANIFEST)


def _idle_until(cluster: dict[str, Any], queries: list[dict[str, Any]]) -> datetime:
    ends = [query["ended_at"] for query in queries if query["cluster_id"] == cluster["id"]]
    idle_since = datetime.fromisoformat(max([cluster["requested_at"], *ends]))
    return idle_since + timedelta(minutes=cluster["idle_timeout_mins"])


def _stopped_clusters(emulator: RunningEmulator) -> list[dict[str, Any]]:
    """Advance the clock to the idle timeouts; return all clusters once they have stopped."""
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
            # Exactly to the timeout: the emulator bills until it checks, not until the timeout.
            emulator.advance_clock(max(first - now, timedelta(0)))
        time.sleep(0.1)
    raise TimeoutError(f"Clusters still run after {STOP_TIMEOUT_S:.0f} s: {clusters}")
