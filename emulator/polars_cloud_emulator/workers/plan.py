"""Serialized plans: parse a plan, and change where it writes.

A plan starts with ``DSL_VERSION``, two version numbers and the hash of the DSL's schema. Then one
MessagePack document follows, in which nodes refer to each other by index. The nodes are the last
part of the document. Before them is the data of the client's own frames, encoded as a number per
byte. Only the nodes are decoded; the data is copied from file to file.
"""

import functools
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import polars as pl

from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.workers import iceberg, sink_targets, written_rows
from polars_cloud_emulator.workers.sink_targets import TEMPORARY

HEADER_LENGTH = len(b"DSL_VERSION") + 2 + 2 + 64
DATA_KEY = msgspec.msgpack.encode("dataframes")
NODES_KEY = msgspec.msgpack.encode("dsl_plans")

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
    file_type: FileType | None


class Source(NamedTuple):
    uri: str
    cloud_options: Node | None


class Document(NamedTuple):
    """A parsed plan."""

    data: slice
    """Position of everything between the root and the nodes."""
    root: int
    nodes: list[Node]

    @property
    def root_node(self) -> Node:
        node: Node = self.nodes[self.root]["value"]
        return node

    def sinks(self) -> list[Node]:
        """Return all sinks, in the order of the query.

        Raises
        ------
        InvalidRequest
            The plan has no sink.
        """
        match self.root_node:
            case {"SinkMultiple": {"inputs": inputs}}:
                return [node["Sink"] for node in inputs]
            case {"Sink": sink}:
                return [sink]
        raise InvalidRequest("the plan does not end in a sink: its rows would be lost")

    def scan_sources(self) -> Iterator[Source]:
        """Yield the files of all scans."""
        for node in self.nodes:
            match node["value"]:
                case {"Scan": {"sources": {"Paths": paths}, "unified_scan_args": arguments}}:
                    for path in paths:
                        yield Source(path["inner"], arguments["cloud_options"])

    def lazy_frame(self, plan: Path, root: int) -> pl.LazyFrame:
        """Return the LazyFrame that ends in the node ``root``, with the data of the plan's file."""
        reference = msgspec.msgpack.encode({"root": self._reference(root)})[1:]
        with tempfile.TemporaryFile(dir=plan.parent) as file:
            file.write(own_header() + b"\x83" + reference)
            with _mapped(plan) as whole, memoryview(whole) as view, view[self.data] as data:
                file.write(data)
            file.write(NODES_KEY + msgspec.msgpack.encode(self.nodes))
            file.seek(0)
            return pl.LazyFrame.deserialize(file)

    def add(self, node: Node) -> Node:
        """Add a node, and return a reference to it."""
        self.nodes.append({"value": node, "version": self.nodes[self.root]["version"]})
        return self._reference(len(self.nodes) - 1)

    def _reference(self, index: int) -> Node:
        return {"idx": index, "version": self.nodes[index]["version"]}


class Prepared(NamedTuple):
    """A plan that the worker can run."""

    plan: Path
    """Path of the serialized plan."""
    document: Document
    sinks: list[Sink]
    """Sinks that write files; callbacks are left out."""
    result: int
    """Index of the node whose rows go into the first sink."""

    def runnable(self) -> pl.LazyFrame:
        return self.document.lazy_frame(self.plan, self.document.root)

    def empty_head(self) -> pl.DataFrame:
        """Return an empty frame with the schema of the first sink's rows."""
        return self.document.lazy_frame(self.plan, self.result).collect_schema().to_frame()


@functools.cache
def own_header() -> bytes:
    """Return the header of plans that this process's Polars reads and writes."""
    return pl.LazyFrame().serialize()[:HEADER_LENGTH]


def parse(plan: bytes) -> Document:
    """Parse a plan.

    Raises
    ------
    InvalidRequest
        The plan was serialized by another version of Polars, or is not a plan.
    """
    if plan[:HEADER_LENGTH] != own_header():
        raise InvalidRequest(
            "the plan was serialized by another version of Polars than that of the workers "
            f"({pl.__version__}); install polars=={pl.__version__} where the client runs"
        )
    return _parse(plan)


def output_location(document: Document) -> str | None:
    """Return the target of the plan's sink as the user wrote it; None for a temporary result."""
    match document.sinks():
        case [{"payload": {"Iceberg": {"table_name": str(name)}}}]:
            return name
        case [{"payload": payload}]:
            uri = sink_targets.uri_of(payload)
            return None if uri == TEMPORARY else uri
    return None


def prepare(plan: Path, temporary_uri: str, part_name: str) -> Prepared:
    """Set the targets of all sinks, and count the rows of the first.

    In a directory, the file is named ``part_name``. A result without a destination is written to
    ``temporary_uri``.

    Raises
    ------
    FileNotFoundError
        A scan reads a local file, which a cluster does not have.
    InvalidRequest
        An Iceberg table is not in an object store.
    """
    with _mapped(plan) as whole:
        document = _parse(whole)
    _check_scans(document, results=temporary_uri.rpartition("/")[0].rpartition("/")[0])
    nodes = document.sinks()
    placed = [_set_target(node["payload"], temporary_uri, part_name) for node in nodes]
    result = nodes[0]["input"]["idx"]
    nodes[0]["input"] = _add_row_counter(document, nodes[0]["input"])
    return Prepared(plan, document, [sink for sink in placed if sink], result)


def _check_scans(document: Document, results: str) -> None:
    for uri, _ in document.scan_sources():
        is_local = "://" not in uri or uri.startswith("file://")
        if is_local and not Path(os.path.normpath(uri)).is_relative_to(results):
            raise FileNotFoundError(f"No such file or directory (os error 2): {uri}")


def _add_row_counter(document: Document, rows: Node) -> Node:
    """Add steps that count the rows of a node, and return a reference to the last step."""
    steps = _parse(written_rows.counting_steps())
    for step in steps.nodes[2:]:  # the first two are an empty entry and the frame
        [arguments] = step["value"].values()
        arguments["input"] = rows
        rows = document.add(step["value"])
    return rows


def _mapped(plan: Path) -> mmap.mmap:
    with plan.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _parse(plan: bytes | mmap.mmap) -> Document:
    end = len(plan)
    data = plan.find(DATA_KEY, HEADER_LENGTH)
    # A name or a text in a node may contain the bytes of the key.
    while (end := plan.rfind(NODES_KEY, HEADER_LENGTH, end)) > data > 0:
        try:
            nodes = msgspec.msgpack.decode(plan[end + len(NODES_KEY) :], type=list[dict[str, Any]])
            root = msgspec.msgpack.decode(b"\x81" + plan[HEADER_LENGTH + 1 : data])
            return Document(slice(data, end), root["root"]["idx"], nodes)
        except msgspec.DecodeError:
            continue
    raise InvalidRequest("the plan was not serialized by Polars")


def _set_target(payload: Node, temporary_uri: str, part_name: str) -> Sink | None:
    """Set the target of one sink; None if it writes no files."""
    [(kind, sink)] = payload.items()
    if kind == "Callback":
        return None
    if kind == "Iceberg":
        return Sink(iceberg.table_location(sink), None)
    [format_name] = sink["file_format"]
    file_type = FILE_TYPES[format_name]
    if kind == "Partitioned":
        return Sink(sink["base_path"]["inner"], file_type)
    target = sink["target"]
    if target["inner"] == TEMPORARY:
        target["inner"] = temporary_uri
        arguments = sink["unified_sink_args"]
        arguments["cloud_options"] = _own_cloud_options(temporary_uri)
        arguments["mkdir"] = True
    if "." not in target["inner"].rpartition("/")[2]:
        target["inner"] = f"{target['inner'].rstrip('/')}/{part_name}.{file_type}"
    return Sink(target["inner"], file_type)


def _own_cloud_options(uri: str) -> Node:
    """Return the cloud options that Polars uses in this process for a sink to ``uri``."""
    plan = pl.LazyFrame().sink_parquet(uri, lazy=True).serialize()
    payload = _parse(plan).root_node["Sink"]["payload"]
    options: Node = payload["File"]["unified_sink_args"]["cloud_options"]
    return options
