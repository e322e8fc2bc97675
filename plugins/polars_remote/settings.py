"""Settings from environment variables. Each has a default."""

import math
import os

from .errors import SettingsError

SWITCH = {"1": True, "true": True, "yes": True, "on": True}
SWITCH |= {"0": False, "false": False, "no": False, "off": False}


def _read_switch(name: str, default: str) -> bool:
    text = os.environ.get(name, default)
    if text.lower() not in SWITCH:
        raise SettingsError(f"{name} is '{text}': give one of {', '.join(SWITCH)}")
    return SWITCH[text.lower()]


def _read_seconds(name: str, default: str) -> float:
    text = os.environ.get(name, default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise SettingsError(f"{name} is '{text}': give seconds, such as {default}")
    return seconds


def _read_price(name: str) -> float | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise SettingsError(f"{name} is '{text}': give the price of a vCPU-hour, such as 0.06")
    return price


def _read_name(name: str, default: str) -> str:
    text = os.environ.get(name, default)
    if not text:
        raise SettingsError(f"{name} is empty: give a name, such as {default}, or unset it")
    return text


PORTAL = os.environ.get("POLARS_CLOUD_PORTAL")
"""Base address of the queries' pages, without a slash at its end; None for Polars Cloud's own."""

WORKSPACE = _read_name("POLARS_CLOUD_WORKSPACE", "playground")
"""Name of the Polars Cloud workspace."""

OUTAGE_SECONDS = _read_seconds("POLARS_CLOUD_OUTAGE", "120")
"""Maximum seconds for which a call is retried while Polars Cloud is unavailable."""

PRICE = _read_price("POLARS_CLOUD_PRICE")
"""Price of a vCPU-hour, in any currency; None to report costs in vCPU-hours only."""

DEFERS = _read_switch("POLARS_CLOUD_DEFER", "1")
"""Whether a `@query_task` is deferred while it waits, which needs a triggerer."""
