"""What all tests share: an emulator, and the real client that talks to it."""

import os
from datetime import UTC, datetime, timedelta
from types import ModuleType

import pytest

from polars_cloud_emulator.testing import RunningEmulator, eventually

pytest_plugins = ["polars_cloud_emulator.pytest_plugin"]


@pytest.fixture(autouse=True)
def one_day() -> None:
    """Begin no test at midnight (UTC), when the emulator writes the sample data of another day."""

    def is_of_one_day() -> bool:
        now = datetime.now(UTC)
        return (now - timedelta(seconds=10)).date() == (now + timedelta(seconds=60)).date()

    eventually(is_of_one_day, pause=0.5)


@pytest.fixture(scope="session")
def polars_cloud_emulator_session(
    polars_cloud_emulator_session: RunningEmulator,
) -> RunningEmulator:
    """The plugin's, without its account: the client logs in when it is told to, as in a DAG."""
    for name in ("POLARS_CLOUD_CLIENT_ID", "POLARS_CLOUD_CLIENT_SECRET"):
        del os.environ[name]
    return polars_cloud_emulator_session


@pytest.fixture
def emulator(polars_cloud_emulator: RunningEmulator) -> RunningEmulator:
    """The emulator as it was at its start."""
    return polars_cloud_emulator


@pytest.fixture
def pc(emulator: RunningEmulator) -> ModuleType:
    """`polars_cloud`, logged in."""
    import polars_cloud

    polars_cloud.authenticate(
        client_id=emulator.environment["POLARS_CLOUD_CLIENT_ID"],
        client_secret=emulator.environment["POLARS_CLOUD_CLIENT_SECRET"],
        interactive=False,
    )
    return polars_cloud
