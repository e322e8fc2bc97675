"""Run the published wiring through the failures that the DAGs are tested with.

Run the DAGs of `published_wiring/` through the scenarios of `tests/failures/`, under Airflow's
scheduler. For each, print which of three promises was broken: the run has the right state, no query
was submitted twice or left running, and no cluster was left running unless its pattern does so.
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from local_airflow import PATTERNS, ROOT, use_airflow

_airflow_home = tempfile.TemporaryDirectory(prefix="airflow-home-")
use_airflow(Path(_airflow_home.name))  # before the first import of Airflow

from tests.failures.deployment import VARIANTS, Deployment, running_deployment  # noqa: E402
from tests.failures.outcome import Outcome, observe  # noqa: E402
from tests.failures.scenarios import SCENARIOS, Expected  # noqa: E402
from tests.manifest_body import MANIFEST_BODY  # noqa: E402

PATIENCE = 60.0
"""Seconds after which a run or its query counts as never ending."""
PROCESSES = 2
OURS = {*VARIANTS, *PATTERNS}
CASES = [
    (what, dag_id)
    for what, scenario in SCENARIOS.items()
    for dag_id in scenario.expected
    if dag_id in OURS  # the others combine helpers, which the published wiring lacks
]
WIDTH = 150


def published_dags() -> dict[str, str]:
    """Return the sources of the published DAGs and of the variants that the scenarios use."""
    folder = ROOT / "benchmarks" / "published_wiring"
    dags = {path.stem: path.read_text() for path in folder.glob("*.py")}
    for variant, (dag_id, changes) in VARIANTS.items():
        source = dags[dag_id].replace(f"published_{dag_id}(", f"published_{variant}(")
        source = source.replace("import datetime\n", "import datetime, timedelta\n")
        for new in changes.values():
            if new.startswith("execution_timeout"):
                source = source.replace("    @task\n", f"    @task({new})\n")
            elif new.startswith("dagrun_timeout"):
                source = source.replace("@dag(", f"@dag({new}, ")
        dags[variant] = source
    return {f"published_{name}": source for name, source in dags.items()}


def verdict(airflow: Deployment, what: str, dag_id: str) -> str:
    """Run the scenario with the published DAG; return what was broken, or an empty string."""
    scenario = SCENARIOS[what]
    expected = scenario.expected[dag_id]
    airflow.end_runs()
    if not what.startswith("the manifest"):
        register_manifest(airflow)
    try:
        run = scenario.act(airflow, f"published_{dag_id}")
        # The published wiring does not log the line that our DAGs log.
        return broken_promise(observe(airflow, run, replace(expected, cause="")), expected)
    except (AssertionError, ValueError):  # a deadline, or an assertion of the scenario
        return "the run or its query does not end"


def broken_promise(outcome: Outcome, expected: Expected) -> str:
    if outcome.run != expected.run:
        return f"the run is {outcome.run}"
    if outcome.submits > expected.submits:
        return f"{outcome.submits} queries, not {expected.submits}"
    if outcome.queries_left > expected.queries_left:
        return f"{outcome.queries_left} queries left running"
    if outcome.clusters_left > expected.clusters_left:
        return f"{outcome.clusters_left} clusters left running"
    return ""


def register_manifest(airflow: Deployment) -> None:
    """Register the manifest that the published DAGs expect."""
    manifest = {**MANIFEST_BODY, "name": "airflow-production", "cluster_size": 3}
    airflow.emulator.api.call("POST", "manifest", manifest)


def verdicts(share: int) -> list[tuple[str, str, str]]:
    """Run every n-th case on an Airflow and an emulator of its own; return the verdicts."""
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_deployment(Path(folder), published_dags()) as airflow,
    ):
        airflow.patience = PATIENCE
        for what, dag_id in CASES[share::PROCESSES]:
            broken = verdict(airflow, what, dag_id)
            found.append((what, dag_id, broken))
            print(f"{dag_id}: {what}: {broken or 'kept'}", flush=True)
    return found


def main() -> None:
    # Spawned, because each process makes its own Airflow home when it imports this module.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        found = [case for share in pool.map(verdicts, range(PROCESSES)) for case in share]
    table = Table("What happens", "DAG", "Published wiring")
    for what, dag_id, broken in sorted(found, key=lambda case: CASES.index(case[:2])):
        table.add_row(what, dag_id, broken or "kept")
    console = Console(highlight=False, width=WIDTH)
    console.print(table)
    kept = sum(not broken for _, _, broken in found)
    console.print(f"The published wiring kept its promises in {kept} of {len(found)} cases")


if __name__ == "__main__":
    main()
