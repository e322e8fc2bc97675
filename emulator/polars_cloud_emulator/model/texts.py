"""Checks of names and labels."""

import unicodedata
from collections.abc import Collection

from polars_cloud_emulator.model.errors import InvalidRequest

MAX_LABELS = 64
MAX_LABEL_BYTES = 32
"""The client's own limits for labels of a query. It does not check labels of a cluster."""


def shown(text: str) -> str:
    """Return the text in quotes, truncated to 60 characters, for an error message."""
    return repr(text if len(text) <= 60 else text[:59] + "…")


def check_name(name: str, what: str, max_bytes: int) -> None:
    """Check a name.

    Raises
    ------
    InvalidRequest
        The name is empty or too long, or has control characters or surrounding whitespace.
    """
    if not 0 < len(name.encode()) <= max_bytes:
        raise InvalidRequest(f"{what} {shown(name)} must have from 1 to {max_bytes} bytes")
    if name != name.strip() or any(unicodedata.category(char) == "Cc" for char in name):
        raise InvalidRequest(
            f"{what} {shown(name)} must not have control characters or surrounding whitespace"
        )


def check_labels(labels: Collection[str]) -> None:
    """Check labels against the client's limits for labels of a query.

    Raises
    ------
    InvalidRequest
        There are too many labels, or a label is not valid.
    """
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(f"at most {MAX_LABELS} labels are allowed, not {len(labels)}")
    for label in labels:
        check_name(label, "label", MAX_LABEL_BYTES)
