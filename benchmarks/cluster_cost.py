"""What each pattern costs: vCPU-hours billed beside query-seconds, and beside the published.

Runs each of the eight DAGs and its counterpart of `published_wiring/`, which asks the same queries,
once with every query succeeding and once with the last one failing and no retries.
"""

from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from benchmarks.pattern_runs import idle_seconds, make_ready, patterns, run_to_its_end
from polars_cloud_emulator.testing import RunningEmulator

if TYPE_CHECKING:
    from airflow.sdk import DAG

FAILURE = "ComputeError: this query was to fail"

NOTE = """
Billed are the vCPU-hours of all nodes from a cluster's request to its stop. Those marked "idle" are
of its idle timeout, which passed on the emulator's clock: the same in each run. All others, and the
seconds of the queries, were measured with small queries and one task at a time: they vary from run
to run, and much of what is billed is Airflow between two tasks. Where neither idles, published /
ours therefore says little. Worker processes that start count as the first query's seconds, unless
the cluster was started before. Queries that ran side by side count each. Ratio: seconds of the
clusters, whatever their size, over those of the queries. Published / ours: of what is billed.
"""


class Cost(NamedTuple):
    """Of one run of a DAG."""

    busy: float
    """vCPU-hours, but for the idle timeout."""
    idle: float
    """vCPU-hours of waiting until the idle timeout."""
    seconds: float
    """Seconds of the clusters."""
    queries: list[float]
    """Seconds."""

    @property
    def billed(self) -> float:
        return self.busy + self.idle

    def cells(self) -> tuple[str, str, str]:
        used = sum(self.queries)
        idle = f" + {self.idle:.4f} idle" if self.idle else ""
        return f"{self.busy:.4f}{idle}", f"{used:.1f}", f"{self.seconds / used:,.1f}"


def measure(emulator: RunningEmulator, dag: "DAG", failing: int | None = None) -> Cost:
    """Run the DAG on an emulator as new; `failing` counts the queries to the one that fails."""
    make_ready(emulator, dag)
    if failing:
        emulator.add_fault("SubmitQuery", "query_fails", nth=failing, error=FAILURE)
    run = run_to_its_end(emulator, dag, FAILURE if failing else None)
    idle = sum(each["vcpus"] * idle_seconds(each) / 3600 for each in run.clusters)
    billed = sum(each["vcpus"] * each["billed_seconds"] / 3600 for each in run.clusters)
    seconds = sum(each["billed_seconds"] for each in run.clusters)
    return Cost(billed - idle, idle, seconds, [query["seconds"] for query in run.queries])


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
    with patterns() as (emulator, console, pairs):
        succeeding = {}
        failing = {}
        for dag_id, pair in pairs.items():
            console.print(f"{dag_id} ...")
            a, b = (measure(emulator, dag) for dag in pair)
            succeeding[dag_id] = a, b
            c, d = (measure(emulator, dag, len(a.queries)) for dag in pair)
            failing[dag_id] = c, d
        report(console, "Every query succeeds", succeeding)
        report(console, "The last query fails, without retries", failing)
        console.print(NOTE)


if __name__ == "__main__":
    main()
