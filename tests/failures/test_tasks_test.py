"""`airflow tasks test` runs a setup without its teardown. The orphans are still cleaned up."""

import subprocess
import sys

import pytest

from polars_cloud_emulator.testing import eventually
from tests.failures.deployment import Deployment


@pytest.mark.dag("manual_shutdown")
def test_end_orphans_stops_the_cluster_of_airflow_tasks_test(
    airflow: Deployment,
) -> None:
    command = [sys.executable, "-m", "airflow", "tasks", "test"]
    subprocess.run([*command, "manual_shutdown", "start_cluster"], check=True, timeout=300)
    run = airflow.trigger("end_orphans")
    run.wait_for_end()
    assert run.state == "success", run.log()[-6000:]
    eventually(lambda: not airflow.emulator.live_clusters())
    # Or by the triggerer's sweep, if that was faster.
    assert "manual_shutdown.start_cluster" in run.log() + airflow.component_log()
