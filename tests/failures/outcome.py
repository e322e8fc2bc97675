"""The outcome of a run, from Airflow's database and the emulator's counters."""

import contextlib
import re
from dataclasses import dataclass

from polars_cloud_emulator.testing import eventually
from tests.failures.deployment import Deployment, Run
from tests.failures.scenarios import Expected

SETTLES_IN = 120.0
"""Maximum seconds after a run's end for its queries and clusters to stop, and for the last logs."""


@dataclass(frozen=True)
class Outcome:
    """Counterpart of `Expected`, with the logs of the tasks."""

    run: str
    submits: int
    cancels: int | None
    failed: frozenset[str]
    tries: int | None
    queries_left: int
    clusters_left: int
    clusters: int | None
    log: str


def observe(airflow: Deployment, run: Run, expected: Expected) -> Outcome:
    """Return the outcome of a run that has ended, when it is as expected or time is up."""
    emulator = airflow.emulator

    def left() -> tuple[int, int]:
        return len(emulator.running_queries()), len(emulator.live_clusters())

    wanted = (expected.queries_left, expected.clusters_left)
    with contextlib.suppress(AssertionError):  # the outcome shows it
        eventually(
            lambda: left() == wanted and re.search(expected.cause, run.log()),
            SETTLES_IN,
            pause=0.2,
        )
    queries = emulator.queries()
    cancels = sum(query["cancels"] for query in queries)
    queries_left, clusters_left = left()
    return Outcome(
        run=run.state,
        submits=len(queries),
        cancels=None if expected.cancels is None and cancels else cancels,
        failed=frozenset(task for task, state in run.tasks().items() if state == "failed"),
        tries=None if expected.tries is None else run.tries(),
        queries_left=queries_left,
        clusters_left=clusters_left,
        clusters=None if expected.clusters is None else len(emulator.api.state()["clusters"]),
        log=run.log(),
    )
