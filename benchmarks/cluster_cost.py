"""Compare the cost of each pattern with the published wiring: vCPU-hours and query seconds.

Run each of the eight DAGs and its counterpart in `published_wiring/`, which has the same queries:
once with every query succeeding, and once with the last one failing and no retries.
"""

from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from benchmarks.pattern_runs import idle_seconds, make_ready, patterns, run_to_its_end
from polars_cloud_emulator.testing import RunningEmulator

if TYPE_CHECKING:
    from airflow.sdk import DAG

FAILURE = "ComputeError: this query fails on purpose"

NOTE = """
"Billed": vCPU-hours of all nodes, from a cluster's request to its stop. "Idle": the part of the
idle timeout, which passed on the emulator's clock and is the same in each run. All other figures
were measured with small queries and one task at a time. They vary from run to run, and contain much
of Airflow's time between two tasks, so "published / ours" says little where no cluster idles.
"Queries": seconds of all queries, also of those that ran at the same time. The start of the worker
processes counts for the first query, unless the cluster was started before. "Ratio": seconds of the
clusters, whatever their size, over seconds of the queries. "Published / ours": ratio of "billed".
"""


class Cost(NamedTuple):
    """Cost of one run of a DAG."""

    busy: float
    """vCPU-hours without the idle timeout."""
    idle: float
    """vCPU-hours of the idle timeout."""
    seconds: float
    """Billed seconds of the clusters."""
    queries: list[float]
    """Seconds of each query."""

    @property
    def billed(self) -> float:
        return self.busy + self.idle

    def cells(self) -> tuple[str, str, str]:
        used = sum(self.queries)
        idle = f" + {self.idle:.4f} idle" if self.idle else ""
        return f"{self.busy:.4f}{idle}", f"{used:.1f}", f"{self.seconds / used:,.1f}"


def measure(emulator: RunningEmulator, dag: "DAG", failing: int | None = None) -> Cost:
    """Reset the emulator and run the DAG; query number `failing`, if given, fails."""
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
