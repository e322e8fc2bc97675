"""The emulator's time: the system's, plus what has been advanced by hand."""

from datetime import UTC, datetime, timedelta


class Clock:
    """Tells the time to everything that bills, expires or times out."""

    def __init__(self) -> None:
        self._ahead = timedelta(0)

    def now(self) -> datetime:
        return datetime.now(UTC) + self._ahead

    def advance(self, by: timedelta) -> None:
        self._ahead += by

    def reset(self) -> None:
        self._ahead = timedelta(0)
