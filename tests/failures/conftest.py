"""One Airflow and one emulator for all failures, as new for each."""

from collections.abc import Iterator

import pytest

from tests.failures.deployment import Deployment, running_deployment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--realistic", action="store_true", help="with clusters that take minutes")


@pytest.fixture(scope="session")
def running_airflow(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Deployment]:
    options = ["--realistic"] if pytestconfig.getoption("--realistic") else []
    folder = tmp_path_factory.mktemp("deployment")
    with running_deployment(folder, emulator_options=options) as deployment:
        yield deployment


@pytest.fixture
def airflow(running_airflow: Deployment) -> Deployment:
    """Airflow in which nothing runs, with an emulator as it was at its start."""
    running_airflow.end_runs()
    return running_airflow
