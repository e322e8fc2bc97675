"""Where moments come to lie on the axis of the page."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from polars_cloud_emulator.planes.timeline import GAP, LABEL, Axis, Interval, Span, total_seconds

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


def interval(start: float, end: float) -> Interval:
    return Interval(NOON + timedelta(seconds=start), NOON + timedelta(seconds=end))


def test_axis_reaches_from_the_first_start_to_the_last_end() -> None:
    axis = Axis([interval(50, 100), interval(0, 60)])
    assert axis.span(interval(0, 25)) == Span(0, 25)
    assert axis.span(interval(75, 100)) == Span(75, 25)
    assert axis.gaps() == []


def test_what_begins_before_or_ends_after_the_axis_is_cut() -> None:
    axis = Axis([interval(0, 100)])
    assert axis.span(interval(-10, 110)) == Span(0, 100)
    assert axis.span(interval(120, 130)).width == 0


def test_night_without_a_cluster_is_left_out() -> None:
    night = 12 * 3600
    axis = Axis([interval(0, 50), interval(night, night + 50)])
    half = (100 - GAP) / 2
    assert axis.span(interval(0, 50)) == Span(0, half)
    assert axis.span(interval(night, night + 50)) == Span(half + GAP, half)
    assert axis.gaps() == [Span(half, GAP)]
    # What lasts through the night crosses it.
    assert axis.span(interval(0, night + 50)) == Span(0, 100)


def test_short_pause_between_two_clusters_is_shown() -> None:
    axis = Axis([interval(0, 50), interval(51, 100)])
    assert axis.gaps() == []
    assert axis.position(NOON + timedelta(seconds=51)) == 51


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (4, ["12:00:00", "12:00:01", "12:00:02", "12:00:03", None]),
        (60, ["12:00:00", "12:00:10", "12:00:20", "12:00:30", "12:00:40", "12:00:50", None]),
        (1800, ["12:00", "12:05", "12:10", "12:15", "12:20", "12:25", None]),
        (7200, ["12:00", "12:30", "13:00", "13:30", None]),
    ],
)
def test_ticks_stand_at_round_times(seconds: int, labels: list[str | None]) -> None:
    axis = Axis([interval(0, seconds)])
    assert [tick.label for tick in axis.ticks()] == labels


def test_labels_neither_touch_each_other_nor_the_end() -> None:
    starts = (0, 3600, 4000, 9000, 20000)
    ticks = Axis([interval(start, start + 100) for start in starts]).ticks()
    labeled = [tick.position for tick in ticks if tick.label]
    assert len(ticks) > len(labeled) > 2
    assert all(after - before >= LABEL for before, after in pairwise(labeled))
    assert labeled[-1] <= 100 - LABEL


def test_ticks_of_weeks_are_few() -> None:
    weeks = Axis([interval(0, 30 * 24 * 3600)])
    assert len(weeks.ticks()) < 40


@pytest.mark.parametrize("intervals", [[], [interval(0, 0)]])
def test_axis_of_no_time_holds_its_moments(intervals: list[Interval]) -> None:
    axis = Axis(intervals)
    assert 0 <= axis.position(NOON) <= 100


def test_seconds_that_overlap_count_once() -> None:
    assert total_seconds([interval(0, 10), interval(5, 20), interval(30, 40)]) == 30
    assert total_seconds([]) == 0
