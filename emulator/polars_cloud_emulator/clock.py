"""The emulator's time: the system's, plus what was advanced by hand or passed over."""

from datetime import UTC, datetime, timedelta


class Clock:
    """Tells the time to everything that bills, expires or times out."""

    def __init__(self) -> None:
        self.reset()

    def now(self) -> datetime:
        return self.now_for_logins() + self._passed_over

    def now_for_logins(self) -> datetime:
        """The time without what was passed over: a client's clock knows nothing of it."""
        return datetime.now(UTC) + self._ahead

    def advance(self, by: timedelta) -> None:
        self._ahead += by

    def pass_over(self, by: timedelta) -> None:
        """Let time pass in which nobody does anything but wait for a cluster."""
        self._passed_over += by

    def reset(self) -> None:
        self._ahead = self._passed_over = timedelta(0)
