"""pytest fixtures: one emulator for the session, reset after each test.

The emulator is not imported or started until a test requests a fixture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from polars_cloud_emulator.testing import RunningEmulator


@pytest.fixture(scope="session")
def polars_cloud_emulator_session() -> Iterator[RunningEmulator]:
    """An emulator for the whole session, whose variables are set in ``os.environ``.

    Raises
    ------
    pytest.UsageError
        ``polars_cloud`` was imported before, with other variables.
    """
    if "polars_cloud" in sys.modules:
        raise pytest.UsageError(
            "polars_cloud was imported before the emulator started, and it reads its addresses "
            "on import: import it in your tests and functions, not at the top of a file"
        )
    from polars_cloud_emulator.testing import running_emulator

    with running_emulator() as emulator, pytest.MonkeyPatch.context() as patch:
        for name, value in emulator.environment.items():
            patch.setenv(name, value)
        yield emulator


@pytest.fixture
def polars_cloud_emulator(
    polars_cloud_emulator_session: RunningEmulator,
) -> Iterator[RunningEmulator]:
    """The session's emulator, reset after the test: sample data, no clusters and no faults."""
    yield polars_cloud_emulator_session
    polars_cloud_emulator_session.reset()
