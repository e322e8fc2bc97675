"""The emulator's clock: the system's time, plus the time that was advanced or skipped.

The clock never goes back, because billing and timeouts depend on time differences.
"""

from datetime import UTC, datetime, timedelta


class Clock:
    """Clock for billing, expiry and timeouts."""

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
        """Return the time without skipped time, because a client's clock does not skip it."""
        return datetime.now(UTC) + self._ahead

    def advance(self, by: timedelta) -> None:
        self._ahead += by

    def skip(self, by: timedelta) -> None:
        """Skip time while clients wait for a cluster."""
        self._skipped += by

    def never_before(self, moment: datetime) -> None:
        """Set a minimum for the time: the latest time of an earlier process."""
        self._latest = max(moment, self._latest)

    def reset(self) -> None:
        self._ahead = self._skipped = timedelta(0)
        self._latest = datetime.min.replace(tzinfo=UTC)
