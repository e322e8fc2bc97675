"""A plan without what opens an object store or a catalog, to be shown when its query has ended."""

from typing import Any

import msgspec

from polars_cloud_emulator.workers.plan import NODES_KEY, Document

LARGEST = 50_000
"""Bytes of a plan that is shown."""
SECRETS: dict[str, Any] = {
    "cloud_options": None,
    "catalog_properties": {},
    "iceberg_storage_properties": {},
}
"""Keys of what may hold secrets, and what stands in its place."""


def without_secrets(plan: bytes, document: Document) -> bytes | None:
    """Return the plan without the storage options of its scans and sinks.

    None if it is too large, or is read by Python objects, which may hold secrets.

    Parameters
    ----------
    document
        The plan, taken apart.
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
