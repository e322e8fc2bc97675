"""Fixtures for pytest: one emulator for the session, emptied for each test.

Nothing is started, and nothing of the emulator imported, until a test asks for one of them.
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
    """An emulator, with the variables that lead there, until the last test has ended.

    Raises
    ------
    pytest.UsageError
        The client was imported before, and goes by other variables.
    """
    if "polars_cloud" in sys.modules:
        raise pytest.UsageError(
            "polars_cloud was imported before the emulator started, and reads where to go when it "
            "is imported: import it in your tests and functions, not at the top of a file"
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
    """The session's emulator as it was at its start: sample data, no cluster and no fault."""
    yield polars_cloud_emulator_session
    polars_cloud_emulator_session.reset()
