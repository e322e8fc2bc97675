"""`waiting/progress.py`: a query is polled often, and its progress is logged rarely."""

from types import SimpleNamespace

import pytest

from polars_remote.waiting import progress
from polars_remote.waiting.progress import Progress, describe_progress, get_poll_interval

MINUTE = 60
HOURS = 3


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def minutes_logged(clock: Clock, begins: int, *, step: int = 1) -> list[float]:
    """Return the ages in minutes at which progress is logged, from an age in seconds on."""
    since, logged = clock.now, []
    clock.now = since + begins
    wait = Progress(since)
    for age in range(begins, HOURS * 60 * MINUTE + 1, step):
        clock.now = since + age
        if wait.should_log():
            logged.append(age / MINUTE)
    return logged


def test_a_wait_is_logged_ever_more_seldom_and_then_each_half_hour(clock: Clock) -> None:
    assert minutes_logged(clock, 0) == [1, 2, 5, 10, 20, 30, 60, 90, 120, 150, 180]


@pytest.mark.parametrize(
    ("begins", "first"),
    [(0, 1), (59, 1), (60, 2), (61, 2), (299, 5), (300, 10), (1799, 30), (1800, 60), (5000, 90)],
)
def test_a_wait_that_is_resumed_repeats_no_line(clock: Clock, begins: int, first: int) -> None:
    assert minutes_logged(clock, begins)[0] == first


def test_a_late_poll_logs_one_line_for_all_that_were_due(clock: Clock) -> None:
    assert minutes_logged(clock, 0, step=7 * MINUTE)[:4] == [7, 14, 21, 35]


def test_a_line_is_logged_once(clock: Clock) -> None:
    wait = Progress(clock.now)
    assert not wait.should_log()
    clock.now += MINUTE
    assert [wait.should_log() for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize("age", [0, 1, 10, 30, 59, 60, 61, 120, 200, 299, 299.9])
def test_in_the_first_five_minutes_a_query_is_polled_each_two_seconds(age: float) -> None:
    assert 0.2 <= get_poll_interval(age) <= 2


@pytest.mark.parametrize("age", [300, 301, 600, 1000, 1600, 3600, 86_400, 30 * 86_400])
def test_later_a_query_is_polled_each_ten_seconds(age: float) -> None:
    assert 1 <= get_poll_interval(age) <= 10


def test_an_older_query_is_polled_no_more_often() -> None:
    pauses = [get_poll_interval(age) for age in range(HOURS * 60 * MINUTE)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 1 < pauses[-1]


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ((3, 8), "INPROGRESS, 3 of 8 stages after 20 min"),
        ((0, None), "INPROGRESS after 20 min"),
        (None, "INPROGRESS after 20 min"),
    ],
)
def test_a_line_shows_status_stages_and_age(
    monkeypatch: pytest.MonkeyPatch, stages: tuple[int, int | None] | None, text: str
) -> None:
    def get_stages(_: object) -> tuple[int, int | None]:
        if stages is None:
            raise RuntimeError("the observatory is out of reach")
        return stages

    monkeypatch.setattr(progress, "get_stages", get_stages)
    status = SimpleNamespace(name="INPROGRESS")
    assert describe_progress(object(), status, 1203.0) == text  # type: ignore[arg-type]
