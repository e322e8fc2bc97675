"""After any failure: it is not hidden, and no query and no cluster is left running."""

import re

import pytest

from polars_cloud_emulator.testing import eventually
from tests.failures.deployment import Deployment
from tests.failures.outcome import observe
from tests.failures.scenarios import IDLE_TIMEOUT, SCENARIOS, SHOWN_WITHOUT_SCHEDULER

ON_ANY_AIRFLOW = {
    "a user marks the task failed",
    "the worker is killed after submitting",
    "the worker is killed at every try",
    "the worker is killed, and the task is cleared and its code was changed",
    "two DAGs share a manifest",
}
"""Scenarios that test the record of queries and clusters on older Airflows, too, and on clusters
that take minutes to start."""

WHERE_TASKS_DEFER = {
    "a user marks the deferred task failed",
    "a user marks the deferred task success",
    "a user marks the deferred task skipped",
    "a user clears the deferred task",
    "a user marks the run failed while its tasks are deferred",
    "a query outlasts the run's dagrun_timeout",
    "tasks that return several queries are deferred",
    "the triggerer is stopped for a while",
    "the triggerer is killed",
    "one of two triggerers is killed",
    "a frozen triggerer wakes up when another has taken its task over",
    "no triggerer watches a deferred task",
    "the cluster takes minutes to start",
    "a user marks the task failed while its cluster starts",
    "the DAG file is edited in mid-query",
}
"""Scenarios that test deferred tasks, on each Airflow on which tasks defer."""


def marks(what: str, further: bool) -> list[pytest.MarkDecorator]:
    if further or what in SHOWN_WITHOUT_SCHEDULER:
        return [pytest.mark.further]
    if what in WHERE_TASKS_DEFER:
        return [pytest.mark.deferred]
    return [pytest.mark.any_airflow, pytest.mark.realistic] if what in ON_ANY_AIRFLOW else []


@pytest.mark.parametrize(
    ("what", "dag_id"),
    [
        pytest.param(
            *(what, dag_id),
            id=f"{what}-{dag_id}".replace(" ", "_"),
            marks=marks(what, further > 0),
        )
        for what, scenario in SCENARIOS.items()
        for further, dag_id in enumerate(scenario.expected)
    ],
)
def test_a_run_ends_as_expected_if(airflow: Deployment, what: str, dag_id: str) -> None:
    scenario = SCENARIOS[what]
    expected = scenario.expected[dag_id]

    outcome = observe(airflow, scenario.act(airflow, dag_id), expected)

    for promise in (
        "run",
        "failed",
        "tries",
        "submits",
        "cancels",
        "queries_left",
        "clusters_left",
        "clusters",
    ):
        assert getattr(outcome, promise) == getattr(expected, promise), (
            f"{promise}\n{outcome.log[-6000:]}"
        )
    assert re.search(expected.cause, outcome.log), outcome.log[-6000:]
    if not outcome.queries_left:
        airflow.emulator.api.advance_clock(IDLE_TIMEOUT)
        eventually(lambda: not airflow.emulator.live_clusters())
