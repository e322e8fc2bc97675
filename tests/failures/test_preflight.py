"""The DAG `preflight` in a deployment."""

import pytest

from tests.failures.deployment import Deployment


@pytest.mark.any_airflow
@pytest.mark.parametrize("spend", [False, pytest.param(True, marks=pytest.mark.realistic)])
def test_preflight_succeeds_and_starts_a_cluster_only_with_the_parameter_spend(
    airflow: Deployment, spend: bool
) -> None:
    run = airflow.trigger("preflight", spend=spend)
    run.wait_for_end()
    assert run.state == "success", run.log()[-6000:]
    assert "Manifest: ok: " in run.log()
    assert ("Stop: ok: " in run.log()) == spend
    clusters = airflow.emulator.api.state()["clusters"]
    assert [cluster["status"] for cluster in clusters] == ["Stopped"] * spend
