"""What all tests share: an emulator, and the real client that talks to it."""

import os
from types import ModuleType

import pytest

from polars_cloud_emulator.testing import RunningEmulator

pytest_plugins = ["polars_cloud_emulator.pytest_plugin"]


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
