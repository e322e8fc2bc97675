"""The emulator's clock."""

from datetime import UTC, datetime, timedelta

import pytest

from emulator.tests.states import MINUTE, new_state, spec
from polars_cloud_emulator import clock as clock_module
from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.clusters import TerminationReason
from polars_cloud_emulator.model.state import Snapshot


class SystemClock:
    """The system's clock, set by the test."""

    time = datetime(2026, 11, 23, tzinfo=UTC)
    min = datetime.min

    @classmethod
    def now(cls, timezone: object) -> datetime:
        return cls.time


def test_time_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_module, "datetime", SystemClock)
    clock = Clock()
    before = clock.now()
    for system, expected in ((-60, 0), (-59, 1), (-3600, 1), (-3590, 11), (10, 3611)):
        monkeypatch.setattr(SystemClock, "time", before + timedelta(seconds=system))
        assert clock.now() == before + timedelta(seconds=expected)
    clock.reset()
    assert clock.now() == SystemClock.time


@pytest.mark.parametrize("stopped", [True, False])
def test_time_continues_after_a_restart(stopped: bool) -> None:
    clock = Clock()
    clock.advance(100 * MINUTE)
    state = new_state(clock)
    cluster = state.clusters.start(spec())
    clock.advance(100 * MINUTE)
    if stopped:
        state.begin_stop(cluster, TerminationReason.STOPPED_BY_USER)
        state.clusters.end_stop(cluster)
    latest = cluster.stopped_at or cluster.requested_at

    after = Clock()
    restarted = new_state(after)
    restarted.restore(Snapshot({}, state.clusters.by_id, {}))
    assert after.now() >= latest
    assert after.now() - latest < MINUTE
    assert restarted.clusters.billed_seconds(cluster) >= (6000 if stopped else 0)
