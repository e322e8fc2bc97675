"""How far the emulator is as slow, and as forgetful, as a cloud."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Realism:
    """What is convenient by default, and different on the real service.

    Attributes
    ----------
    startup
        Time on the emulator's clock until a cluster takes queries.
    speed
        Of the clock while a cluster starts, compared with the system's.
    result_lifetime
        Time until a result without a destination is deleted; None for never.
    unique_names
        Whether each query names the files that it writes to a directory differently, so that those
        of an earlier run stay there.
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
