"""All eight DAGs at the same time, without a failure."""

import pytest

from polars_cloud_emulator.testing import eventually
from tests.eight_dags import KEPT
from tests.failures.deployment import Deployment

LEAVE_THEIR_CLUSTER = {"airflow-production", "airflow-single-query", "airflow-status-check"}
"""Manifests of the clusters that only their idle timeout stops."""


@pytest.mark.any_airflow
@pytest.mark.realistic
@pytest.mark.further  # tests/template/test_standalone.py runs them all on the newest Airflow
def test_every_pattern_succeeds_and_leaves_nothing(airflow: Deployment) -> None:
    emulator = airflow.emulator
    links = set[str]()
    for run in [airflow.trigger(dag_id) for dag_id in sorted(KEPT)]:
        run.wait_for_end()
        assert (run.state, run.tries()) == ("success", 1), run.log()[-6000:]
        links |= run.links()
    eventually(lambda: not emulator.running_queries())
    assert {query["status"] for query in emulator.queries()} == {"Success"}
    assert all(query["n_rows"] for query in emulator.queries())
    first = {tuple(query["labels"]): query["id"] for query in reversed(emulator.queries())}
    assert {link.rpartition("/")[2] for link in links} == set(first.values())
    assert {cluster["manifest"] for cluster in emulator.live_clusters()} <= LEAVE_THEIR_CLUSTER
    assert emulator.api.state()["unmatched"] == []
    on_record = airflow.call("GET", "variables?variable_key_pattern=polars_cloud/%25")
    assert on_record["variables"] == []
