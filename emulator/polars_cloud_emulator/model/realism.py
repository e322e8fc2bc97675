"""Settings for realistic delays, expiry and file names."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Realism:
    """Differences between a convenient emulator, the default, and the real service.

    Attributes
    ----------
    startup
        Start-up time of a cluster, on the emulator's clock.
    speed
        Speed of the emulator's clock while a cluster starts, relative to the system's clock.
    result_lifetime
        Time until a result without a destination is deleted; None for never.
    unique_names
        True if each query writes files with new names into a directory, so that files of an
        earlier run stay there.
    """

    startup: timedelta = timedelta(0)
    speed: float = 1.0
    result_lifetime: timedelta | None = None
    unique_names: bool = False


CONVENIENT = Realism()
REALISTIC = Realism(
    startup=timedelta(minutes=3),
    speed=240.0,
    result_lifetime=timedelta(hours=4),
    unique_names=True,
)
