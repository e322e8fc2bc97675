"""The names of this machine, which no web page can point elsewhere.

The owner of a page can point the page's own name at 127.0.0.1 (DNS rebinding). A browser then takes
the emulator for that page's server, and lets its scripts read every answer. They cannot change the
``Host`` header, which holds the page's name.
"""

import ipaddress
import re
from collections.abc import Iterable

# A name or an address, and perhaps a port; no user name and no path.
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z_.-]+)(?::[0-9]{1,5})?", re.ASCII | re.IGNORECASE)


def is_own_host(host: str, own: Iterable[str]) -> bool:
    """Return whether a ``Host`` header names this machine, with any port or none.

    Parameters
    ----------
    host
        The header as it came. Its port is not compared, because ports can be mapped.
    own
        Names and addresses of this machine beside ``localhost`` and the loopback addresses.
    """
    authority = AUTHORITY.fullmatch(host)
    if authority is None:
        return False
    name = _canonical(authority[1].strip("[]"))
    return name == "localhost" or name in map(_canonical, own) or _is_loopback(name)


def _canonical(name: str) -> str:
    # A dot at the end marks a complete name, which is the same name.
    return name.lower().removesuffix(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
