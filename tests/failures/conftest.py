"""One Airflow and one emulator for all failures, reset for each test."""

from collections.abc import Iterator

import pytest

from polars_remote.compat.versions import TRIGGERS_CAN_CALL_AIRFLOW
from tests.failures.deployment import Deployment, running_deployment


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that need deferred tasks, on an Airflow without them."""
    if TRIGGERS_CAN_CALL_AIRFLOW:
        return
    deferred = [item for item in items if item.get_closest_marker("deferred")]
    config.hook.pytest_deselected(items=deferred)
    items[:] = [item for item in items if item not in deferred]


@pytest.fixture(scope="session")
def running_airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with running_deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment


@pytest.fixture
def airflow(running_airflow: Deployment, request: pytest.FixtureRequest) -> Deployment:
    """An Airflow in which nothing runs, with an emulator that was reset."""
    options = ["--realistic"] if request.node.get_closest_marker("realistic") else []
    running_airflow.emulator.restart_with(*options)
    running_airflow.end_runs()
    return running_airflow
