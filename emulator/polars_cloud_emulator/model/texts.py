"""Bounds of the names and labels that a client gives."""

import unicodedata
from collections.abc import Collection

from polars_cloud_emulator.model.errors import InvalidRequest

MAX_LABELS = 64
MAX_LABEL_BYTES = 32
"""The client's own bounds for the labels of a query; those of a cluster it does not check."""


def shown(text: str) -> str:
    """The text for an error: between quotes, and not longer than a line."""
    return repr(text if len(text) <= 60 else text[:59] + "…")


def check_name(name: str, what: str, max_bytes: int) -> None:
    """Refuse a name that is empty, too long, or looks like another one.

    Raises
    ------
    InvalidRequest
        With the name.
    """
    if not 0 < len(name.encode()) <= max_bytes:
        raise InvalidRequest(f"{what} {shown(name)} must have from 1 to {max_bytes} bytes")
    if name != name.strip() or any(unicodedata.category(char) == "Cc" for char in name):
        raise InvalidRequest(
            f"{what} {shown(name)} must not have control characters or surrounding whitespace"
        )


def check_labels(labels: Collection[str]) -> None:
    """Refuse labels that the client would not let pass on a query.

    Raises
    ------
    InvalidRequest
        With the label to change.
    """
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(f"at most {MAX_LABELS} labels are possible, not {len(labels)}")
    for label in labels:
        check_name(label, "label", MAX_LABEL_BYTES)
