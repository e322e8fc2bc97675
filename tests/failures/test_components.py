"""The components of Airflow that run no task load no Polars, and no plugin fails."""

import polars  # noqa: F401  # loaded here to show that the test detects it
import psutil
import pytest

from polars_cloud_emulator.testing import eventually
from tests.failures.deployment import (
    API_SERVER,
    DAG_PROCESSOR,
    SCHEDULER,
    Deployment,
    with_polars,
)


@pytest.mark.dag("manifest_reuse")
@pytest.mark.any_airflow
def test_neither_api_server_nor_scheduler_nor_dag_processor_loads_polars(
    airflow: Deployment,
) -> None:
    run = airflow.trigger("manifest_reuse")
    run.wait_for_end()
    assert run.state == "success", run.log()[-6000:]
    other = airflow.trigger("status_check")
    other.wait_for_end()
    links = run.links() | other.links()
    assert {link.rpartition("/")[2] for link in links} == {
        q["id"] for q in airflow.emulator.queries()
    }
    assert airflow.call("GET", "plugins/importErrors")["import_errors"] == []
    assert len(with_polars([psutil.Process()])) == 1
    parts = [airflow.processes[part] for part in (API_SERVER, SCHEDULER, DAG_PROCESSOR)]

    def loaded() -> list[str]:
        # Callbacks may load it: each runs in a short-lived process of its own.
        return with_polars(each for part in parts for each in (part, *part.children(True)))

    eventually(lambda: loaded() == [], pause=0.5)
