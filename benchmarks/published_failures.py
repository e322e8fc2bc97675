"""How the DAGs and the published wiring come out of the same failures.

Puts both, one after the other, through the scenarios of `tests/failures/` under Airflow's scheduler
and prints for each whether it kept three promises: the run tells the truth, no query was submitted
twice or left running, and no cluster was left running but those that idle by design.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from local_airflow import ROOT, use_airflow

_airflow_home = tempfile.TemporaryDirectory(prefix="airflow-home-")
use_airflow(Path(_airflow_home.name))  # before the first import of Airflow

from tests.emulator.raw_calls import CLUSTER, WORKSPACE, rest_client  # noqa: E402
from tests.failures.deployment import VARIANTS, Deployment, running_deployment  # noqa: E402
from tests.failures.outcome import Outcome, observe  # noqa: E402
from tests.failures.scenarios import SCENARIOS, Expected  # noqa: E402

ENDS_IN = 45.0
"""Seconds after which a run counts as one that does not end."""
WIDTH = 150

Verdicts = dict[tuple[str, str], str]
"""By scenario and DAG, the promise that was broken; empty if none was."""


def published_dags() -> dict[str, str]:
    """Sources of the published DAGs, and of those variants of them that the scenarios use."""
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


def verdicts(sources: Mapping[str, str] | None, prefix: str, console: Console) -> Verdicts:
    """Act out every scenario with the DAGs whose ids begin with the prefix."""
    found: Verdicts = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_deployment(Path(folder), sources) as airflow,
    ):
        airflow.ends_in = ENDS_IN
        for what, scenario in SCENARIOS.items():
            for dag_id, expected in scenario.expected.items():
                airflow.end_runs()
                if prefix and not what.startswith("the manifest"):
                    register_manifest(airflow)
                try:
                    run = scenario.act(airflow, prefix + dag_id)
                    verdict = broken_promise(observe(airflow, run, expected), expected)
                except AssertionError as error:
                    verdict = str(error).partition("\n")[0]
                found[what, dag_id] = verdict
                console.print(f"{prefix}{dag_id}: {what}: {verdict or 'kept'}")
    return found


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
    """The published DAGs take it for granted."""
    manifest = {**CLUSTER, "name": "airflow-production", "cluster_size": 3}
    with rest_client(airflow.emulator.api.environment) as rest:
        rest.post(f"{WORKSPACE}/manifest", json=manifest).raise_for_status()


def main() -> None:
    console = Console(highlight=False, width=WIDTH)
    ours = verdicts(None, "", console)
    published = verdicts(published_dags(), "published_", console)
    table = Table("What happens", "DAG", "Ours", "Published", title="Promises")
    for what, dag_id in ours:
        cells = [found[what, dag_id] or "kept" for found in (ours, published)]
        table.add_row(what, dag_id, *cells)
    console.print(table)
    for name, found in (("Ours", ours), ("Published", published)):
        kept = sum(not verdict for verdict in found.values())
        console.print(f"{name}: kept in {kept} of {len(found)}")


if __name__ == "__main__":
    main()
