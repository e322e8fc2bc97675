"""One Airflow and one emulator for all failures, as new for each."""

from collections.abc import Iterator

import pytest

from tests.failures.deployment import Deployment, running_deployment


@pytest.fixture(scope="session")
def running_airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with running_deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment


@pytest.fixture
def airflow(running_airflow: Deployment, request: pytest.FixtureRequest) -> Deployment:
    """Airflow in which nothing runs, with an emulator as it was at its start."""
    options = ["--realistic"] if request.node.get_closest_marker("realistic") else []
    running_airflow.emulator.restart_with(*options)
    running_airflow.end_runs()
    return running_airflow
