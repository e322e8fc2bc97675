"""Check of the ``Host`` header against DNS rebinding.

The owner of a web page can point the page's host name at 127.0.0.1. A browser then takes the
emulator for that page's server, and lets the page's scripts read every response. The scripts cannot
change the ``Host`` header, which contains the page's host name.
"""

import ipaddress
import re
from collections.abc import Iterable

# A host name or an address with an optional port; no user name and no path.
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z_.-]+)(?::[0-9]{1,5})?", re.ASCII | re.IGNORECASE)


def is_own_host(host: str, own: Iterable[str]) -> bool:
    """Return whether a ``Host`` header names this machine.

    Parameters
    ----------
    host
        The header as received. Its port is ignored, because ports can be mapped.
    own
        Names and addresses of this machine, besides ``localhost`` and the loopback addresses.
    """
    authority = AUTHORITY.fullmatch(host)
    if authority is None:
        return False
    name = _canonical(authority[1].strip("[]"))
    return name == "localhost" or name in map(_canonical, own) or _is_loopback(name)


def _canonical(name: str) -> str:
    # A trailing dot marks a fully qualified name; the name is the same.
    return name.lower().removesuffix(".")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
