"""When clusters and their queries were what, as places on an axis from 0 to 100 percent.

Nothing happens for hours between two runs: the axis leaves such times out.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

LONGEST_GAP = 0.05
"""Share of the time shown from which a time without a cluster is left out."""
GAP = 3.0
"""Percent of the axis that stand for a time left out."""
TICKS = 6
LABEL = 14.0
"""Percent of the axis that a label takes on a narrow page."""
STEPS = [
    *(timedelta(seconds=n) for n in (1, 2, 5, 10, 15, 30)),
    *(timedelta(minutes=n) for n in (1, 2, 5, 10, 15, 30)),
    *(timedelta(hours=n) for n in (1, 2, 3, 6, 12, 24)),
]


class Interval(NamedTuple):
    start: datetime
    end: datetime

    @property
    def length(self) -> timedelta:
        return self.end - self.start


class Tick(NamedTuple):
    position: float
    label: str | None
    """None where it would touch the label before it, or the end of the axis."""


class Span(NamedTuple):
    """A part of the axis: where it begins and how long it is, in percent."""

    left: float
    width: float

    @property
    def right(self) -> float:
        return self.left + self.width


class Axis:
    """Places of moments on the axis.

    Parameters
    ----------
    intervals
        The times to be shown, in any order; they may overlap. None shows nothing.
    """

    def __init__(self, intervals: Iterable[Interval]) -> None:
        busy = _merged(intervals, timedelta())
        longest = sum((each.length for each in busy), timedelta()) * LONGEST_GAP
        self._parts = _merged(busy, max(longest, timedelta(seconds=1)))
        shown = sum((part.length for part in self._parts), timedelta())
        room = 100 - GAP * max(0, len(self._parts) - 1)
        self._percent_per_second = room / max(shown.total_seconds(), 0.001)

    def position(self, moment: datetime) -> float:
        left = 0.0
        for part in self._parts:
            inside = min(max(moment, part.start), part.end) - part.start
            left += inside.total_seconds() * self._percent_per_second
            if moment <= part.end:
                break
            left += GAP
        return round(min(left, 100.0), 3)

    def span(self, interval: Interval) -> Span:
        left = self.position(interval.start)
        return Span(left, round(max(self.position(interval.end) - left, 0.0), 3))

    def ticks(self) -> list[Tick]:
        """Round times of the day."""
        shown = sum((part.length for part in self._parts), timedelta())
        step = next((step for step in STEPS if shown / step <= TICKS), STEPS[-1])
        ticks: list[Tick] = []
        free = 0.0
        for part in self._parts:
            midnight = part.start.replace(hour=0, minute=0, second=0, microsecond=0)
            moment = midnight + step * -((midnight - part.start) // step)
            while moment <= part.end:
                text = f"{moment:%H:%M:%S}" if step < timedelta(minutes=1) else f"{moment:%H:%M}"
                position = self.position(moment)
                has_room = free <= position <= 100 - LABEL
                free = position + LABEL if has_room else free
                ticks.append(Tick(position, text if has_room else None))
                moment += step
        return ticks

    def gaps(self) -> list[Span]:
        return [Span(self.position(part.end), GAP) for part in self._parts[:-1]]


def total_seconds(intervals: Iterable[Interval]) -> float:
    """Seconds that lie in at least one of the intervals."""
    merged = _merged(intervals, timedelta())
    return sum((each.length for each in merged), timedelta()).total_seconds()


def _merged(intervals: Iterable[Interval], gap: timedelta) -> Sequence[Interval]:
    """The intervals in order, those joined that are no farther than ``gap`` from each other."""
    merged: list[Interval] = []
    for each in sorted(intervals):
        if merged and each.start - merged[-1].end <= gap:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].end, each.end))
        else:
            merged.append(each)
    return merged
