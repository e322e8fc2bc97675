"""A plan without credentials of object stores and catalogs, to show after its query has ended."""

from typing import Any

import msgspec

from polars_cloud_emulator.workers.plan import NODES_KEY, Document

LARGEST = 50_000
"""Maximum bytes of a plan that is shown."""
SECRETS: dict[str, Any] = {
    "cloud_options": None,
    "catalog_properties": {},
    "iceberg_storage_properties": {},
}
"""Keys that may contain secrets, with their replacements."""


def without_secrets(plan: bytes, document: Document) -> bytes | None:
    """Return the plan without the storage options of its scans and sinks.

    None if the plan is too large, or has scans by Python objects, which may contain secrets.

    Parameters
    ----------
    document
        The parsed plan.
    """
    if len(plan) > LARGEST or any(map(_is_opaque, document.nodes)):
        return None
    nodes = msgspec.msgpack.encode(_without_secrets(document.nodes))
    return plan[: document.data.stop] + NODES_KEY + nodes


def _is_opaque(node: dict[str, Any]) -> bool:
    match node["value"]:
        case {"PythonScan": _} | {"Scan": {"scan_type": {"PythonDataset": _}}}:
            return True
    return False


def _without_secrets(part: Any) -> Any:
    if isinstance(part, dict):
        return {
            key: SECRETS[key] if key in SECRETS else _without_secrets(value)
            for key, value in part.items()
        }
    return [*map(_without_secrets, part)] if isinstance(part, list) else part
