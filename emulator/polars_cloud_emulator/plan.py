"""The serialized plan of a query: is it readable here, and where does it write?

A plan is ``DSL_VERSION``, two version numbers and the hash of the DSL's schema, followed by one
MessagePack document in which nodes refer to each other by index.
"""

import functools
import io
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec
import polars as pl

from polars_cloud_emulator.errors import InvalidRequest

HEADER_LENGTH = len(b"DSL_VERSION") + 2 + 2 + 64
TEMPORARY = "<in-memory>"

FileType = Literal["parquet", "ipc", "csv", "ndjson"]
FILE_TYPES: dict[str, FileType] = {
    "Parquet": "parquet",
    "Ipc": "ipc",
    "Csv": "csv",
    "NDJson": "ndjson",
}

Node = dict[str, Any]


class Sink(NamedTuple):
    uri: str
    file_type: FileType
    has_header: bool
    cloud_options: Node | None


@functools.cache
def own_header() -> bytes:
    """The header of every plan that this process's Polars writes and reads."""
    return pl.LazyFrame().serialize()[:HEADER_LENGTH]


def check(plan: bytes) -> None:
    """Refuse what no worker here could run.

    Raises
    ------
    InvalidRequest
        The plan was serialized by another Polars.
    """
    if plan[:HEADER_LENGTH] != own_header():
        raise InvalidRequest(
            "this plan was not serialized by the Polars that the workers run "
            f"({pl.__version__}); install polars=={pl.__version__} beside the client"
        )


def output_location(plan: bytes) -> str | None:
    """Where the plan's sink writes, as its author wrote it; None for a temporary result."""
    match _root(msgspec.msgpack.decode(plan[HEADER_LENGTH:])):
        case {"Sink": {"payload": {"File": {"target": {"inner": str(uri)}}}}} if uri != TEMPORARY:
            return uri
        case {"Sink": {"payload": {"Partitioned": {"base_path": {"inner": str(uri)}}}}}:
            return uri
    return None


def with_destinations(plan: bytes, temporary_uri: str) -> tuple[bytes, list[Sink]]:
    """The plan with every sink's target made a place that Polars can write, and those places.

    A directory gets a part file; a result without a destination goes below ``temporary_uri``.
    """
    document = msgspec.msgpack.decode(plan[HEADER_LENGTH:])
    root = _root(document)
    if "SinkMultiple" in root:
        nodes = [node["Sink"] for node in root["SinkMultiple"]["inputs"]]
    else:
        nodes = [root["Sink"]]
    sinks = [_place(node["payload"], temporary_uri) for node in nodes]
    rewritten = plan[:HEADER_LENGTH] + msgspec.msgpack.encode(document)
    return rewritten, [sink for sink in sinks if sink is not None]


def scan_written(sink: Sink) -> pl.LazyFrame:
    """A scan of what the sink wrote, with the sink's own credentials."""
    scans: dict[FileType, Callable[[str], pl.LazyFrame]] = {
        "parquet": pl.scan_parquet,
        "ipc": pl.scan_ipc,
        "csv": functools.partial(pl.scan_csv, has_header=sink.has_header),
        "ndjson": pl.scan_ndjson,
    }
    plan = scans[sink.file_type](sink.uri).serialize()
    document = msgspec.msgpack.decode(plan[HEADER_LENGTH:])
    _root(document)["Scan"]["unified_scan_args"]["cloud_options"] = sink.cloud_options
    return pl.LazyFrame.deserialize(
        io.BytesIO(plan[:HEADER_LENGTH] + msgspec.msgpack.encode(document))
    )


def _root(document: Node) -> Node:
    node: Node = document["dsl_plans"][document["root"]["idx"]]["value"]
    return node


def _place(payload: Node, temporary_uri: str) -> Sink | None:
    """Settle where one sink writes; None for a callback, which writes nothing itself."""
    if "Callback" in payload:
        return None
    [(kind, sink)] = payload.items()
    arguments = sink["unified_sink_args"]
    arguments["mkdir"] = True
    [(format_name, options)] = sink["file_format"].items()
    file_type = FILE_TYPES[format_name]
    if kind == "Partitioned":
        uri = sink["base_path"]["inner"]
    else:
        target = sink["target"]
        if target["inner"] == TEMPORARY:
            target["inner"] = temporary_uri
            arguments["cloud_options"] = _own_cloud_options(temporary_uri)
        if "." not in target["inner"].rpartition("/")[2]:
            target["inner"] = f"{target['inner'].rstrip('/')}/00000000.{file_type}"
        uri = target["inner"]
    has_header = file_type == "csv" and options["include_header"]
    return Sink(uri, file_type, has_header, arguments["cloud_options"])


def _own_cloud_options(uri: str) -> Node:
    """The options that this process's own sink to ``uri`` would have."""
    plan = pl.LazyFrame().sink_parquet(uri, lazy=True).serialize()
    payload = _root(msgspec.msgpack.decode(plan[HEADER_LENGTH:]))["Sink"]["payload"]
    options: Node = payload["File"]["unified_sink_args"]["cloud_options"]
    return options
