"""The emulator's time: the system's, plus what was advanced by hand or passed over.

It never goes back: whoever is billed or times out goes by the difference of two moments.
"""

from datetime import UTC, datetime, timedelta


class Clock:
    """Tells the time to everything that bills, expires or times out."""

    _latest: datetime

    def __init__(self) -> None:
        self.reset()

    def now(self) -> datetime:
        now = self.now_for_logins() + self._skipped
        if now < self._latest:  # the system's clock was set back
            self.skip(self._latest - now)
        self._latest = max(now, self._latest)
        return self._latest

    def now_for_logins(self) -> datetime:
        """The time without what was passed over: a client's clock knows nothing of it."""
        return datetime.now(UTC) + self._ahead

    def advance(self, by: timedelta) -> None:
        self._ahead += by

    def skip(self, by: timedelta) -> None:
        """Let time pass in which nobody does anything but wait for a cluster."""
        self._skipped += by

    def never_before(self, moment: datetime) -> None:
        """Let it be no earlier than a moment of an emulator that has ended."""
        self._latest = max(moment, self._latest)

    def reset(self) -> None:
        self._ahead = self._skipped = timedelta(0)
        self._latest = datetime.min.replace(tzinfo=UTC)
