"""Read a query's sources and destinations from its serialized plan."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

NODES_KEY = msgspec.msgpack.encode("dsl_plans")
DATA_KEY = msgspec.msgpack.encode("dataframes")
HEADER_LENGTH = len(b"DSL_VERSION") + 2 + 2 + 64
TEMPORARY, TO_CLIENT = "<in-memory>", "<flight>"
"""Targets of a temporary result, and of a result that the client reads."""


class Table(NamedTuple):
    """An Iceberg table that a query writes to.

    Attributes
    ----------
    name
        Name in its catalog, with namespaces.
    is_appended_to
        Whether the query appends; otherwise it replaces all rows.
    sink_uuid
        UUID that Polars writes into the summary of the snapshot.
    """

    name: str
    is_appended_to: bool
    sink_uuid: str


class Plan(NamedTuple):
    """Identity, sources and destinations of a query.

    Attributes
    ----------
    destinations
        URIs that its sinks name. Empty for a temporary result.
    digest
        Digest of the plan's bytes. The same code gives the same bytes in each process, unless the
        plan contains a Python `set`.
    has_location
        Whether a successful query has a `location`; False for `sink_batches` and `explain`.
    returns_to_client
        Whether the client reads the result from the cluster, as for `explain`.
    tables
        Iceberg tables that its sinks name.
    scans
        Paths of the files and folders of each scan. In-memory frames, and sources in Python such as
        Iceberg tables, have none.
    """

    destinations: tuple[str, ...]
    digest: str
    has_location: bool
    returns_to_client: bool
    tables: tuple[Table, ...]
    scans: tuple[tuple[str, ...], ...]


def read_plan(plan: bytes) -> Plan:
    """Return the identity, sinks and scans of a plan that Polars 2.0 serialized.

    A plan is a header and a MessagePack document: the root's index, the data of in-memory frames,
    and last the nodes. Only the root and the nodes are decoded.

    Raises
    ------
    ValueError
        The plan has another format.
    """
    root, nodes = _find_nodes(plan)
    sinks = root["SinkMultiple"]["inputs"] if "SinkMultiple" in root else [root]
    payloads = [sink["Sink"]["payload"] for sink in sinks]
    uris = [_find_uri(payload) for payload in payloads]
    return Plan(
        tuple(uri for uri in uris if uri not in (None, TEMPORARY, TO_CLIENT)),
        hashlib.sha256(plan).hexdigest()[:16],
        None not in uris and TO_CLIENT not in uris,
        TO_CLIENT in uris,
        tuple(_read_table(each["Iceberg"]) for each in payloads if "Iceberg" in each),
        tuple(_find_paths(nodes)),
    )


def set_sink_uuid(plan: bytes, table: Table, sink_uuid: str) -> bytes:
    """Return the plan with another UUID for its sink to the table.

    If the table has a snapshot with the sink's UUID, Polars commits nothing.
    """
    old, new = (msgspec.msgpack.encode(each) for each in (table.sink_uuid, sink_uuid))
    if plan.count(old) != 1:
        raise ValueError(
            f"Cannot find the sink to {table.name} in the query's plan: install the Polars of "
            "requirements.txt"
        )
    return plan.replace(old, new)


def _find_nodes(plan: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the root node and all nodes."""
    end = len(plan)
    data = plan.find(DATA_KEY, HEADER_LENGTH)
    # A text in a node, or the data of a frame, may contain the same bytes as the key.
    while (end := plan.rfind(NODES_KEY, HEADER_LENGTH, end)) > data > 0:
        try:
            nodes = msgspec.msgpack.decode(plan[end + len(NODES_KEY) :], type=list[dict[str, Any]])
            start = msgspec.msgpack.decode(b"\x81" + plan[HEADER_LENGTH + 1 : data])
        except msgspec.DecodeError:
            continue
        values = [node["value"] for node in nodes]
        return values[start["root"]["idx"]], values
    raise ValueError("Cannot read the query's plan: install the Polars of requirements.txt")


def _find_uri(payload: dict[str, Any]) -> str | None:
    match payload:
        case {"File": {"target": {"inner": str(uri)}}}:
            return uri
        case {"Partitioned": {"base_path": {"inner": str(uri)}}}:
            return uri
    return None


def _read_table(sink: dict[str, Any]) -> Table:
    return Table(sink["table_name"], sink["mode"] == "Append", sink["sink_uuid_str"])


def _find_paths(nodes: list[Any]) -> Iterator[tuple[str, ...]]:
    """Yield the paths of each scan. A scan may be nested in another node, as in a concatenation."""
    left = nodes[::-1]
    while left:
        match left.pop():
            case {"Scan": {"sources": {"Paths": [*paths]}}}:
                yield tuple(path["inner"] for path in paths if isinstance(path, dict))
            case dict(inner):
                left += [*inner.values()][::-1]
            case list(inner):
                left += inner[::-1]
