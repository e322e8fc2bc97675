"""The serialized plan of a query: is it readable here, and where does it write?

A plan is ``DSL_VERSION``, two version numbers and the hash of the DSL's schema, followed by one
MessagePack document in which nodes refer to each other by index. The nodes come last in it, and the
data of a client's own frames before them, a number per byte: only the nodes are ever decoded, and
the data goes from file to file.
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
    """A plan, taken apart."""

    data: slice
    """Where everything between the root and the nodes lies."""
    root: int
    nodes: list[Node]

    @property
    def root_node(self) -> Node:
        node: Node = self.nodes[self.root]["value"]
        return node

    def sinks(self) -> list[Node]:
        """Every sink, in the order of the query.

        Raises
        ------
        InvalidRequest
            The plan has none.
        """
        match self.root_node:
            case {"SinkMultiple": {"inputs": inputs}}:
                return [node["Sink"] for node in inputs]
            case {"Sink": sink}:
                return [sink]
        raise InvalidRequest("this plan ends in no sink: nothing would be left of its rows")

    def scan_sources(self) -> Iterator[Source]:
        """What the scans read, file by file."""
        for node in self.nodes:
            match node["value"]:
                case {"Scan": {"sources": {"Paths": paths}, "unified_scan_args": arguments}}:
                    for path in paths:
                        yield Source(path["inner"], arguments["cloud_options"])

    def lazy_frame(self, plan: Path, root: int) -> pl.LazyFrame:
        """What ends in the node ``root``, with the data of the plan that this was."""
        reference = msgspec.msgpack.encode({"root": self._reference(root)})[1:]
        with tempfile.TemporaryFile(dir=plan.parent) as file:
            file.write(own_header() + b"\x83" + reference)
            with _mapped(plan) as whole, memoryview(whole) as view, view[self.data] as data:
                file.write(data)
            file.write(NODES_KEY + msgspec.msgpack.encode(self.nodes))
            file.seek(0)
            return pl.LazyFrame.deserialize(file)

    def add(self, node: Node) -> Node:
        """Add a node; the reference to it."""
        self.nodes.append({"value": node, "version": self.nodes[self.root]["version"]})
        return self._reference(len(self.nodes) - 1)

    def _reference(self, index: int) -> Node:
        return {"idx": index, "version": self.nodes[index]["version"]}


class Prepared(NamedTuple):
    """A plan that Polars can run here."""

    plan: Path
    """File that it came in."""
    document: Document
    sinks: list[Sink]
    """Those that write; a callback writes nothing itself."""
    result: int
    """The node whose rows the first sink gets."""

    def runnable(self) -> pl.LazyFrame:
        return self.document.lazy_frame(self.plan, self.document.root)

    def empty_head(self) -> pl.DataFrame:
        """What the first sink gets, without its rows."""
        return self.document.lazy_frame(self.plan, self.result).collect_schema().to_frame()


@functools.cache
def own_header() -> bytes:
    """The header of every plan that this process's Polars writes and reads."""
    return pl.LazyFrame().serialize()[:HEADER_LENGTH]


def parse(plan: bytes) -> Document:
    """Take a plan apart.

    Raises
    ------
    InvalidRequest
        The plan was serialized by another Polars, or is none.
    """
    if plan[:HEADER_LENGTH] != own_header():
        raise InvalidRequest(
            "this plan was not serialized by the Polars that the workers run "
            f"({pl.__version__}); install polars=={pl.__version__} beside the client"
        )
    return _parse(plan)


def output_location(document: Document) -> str | None:
    """Where the plan's sink writes, as its author wrote it; None for a temporary result."""
    match document.sinks():
        case [{"payload": {"Iceberg": {"table_name": str(name)}}}]:
            return name
        case [{"payload": payload}]:
            uri = sink_targets.uri_of(payload)
            return None if uri == TEMPORARY else uri
    return None


def prepare(plan: Path, temporary_uri: str, part_name: str) -> Prepared:
    """Make every sink's target a place that Polars can write, and let the first note its rows.

    A directory gets a file that is called ``part_name``; a result without a destination goes below
    ``temporary_uri``.

    Raises
    ------
    FileNotFoundError
        A scan reads a file of the client's machine, which a cluster does not have.
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
    """Add the steps that note the rows of a node; the reference to their end."""
    steps = _parse(written_rows.counting_steps())
    for step in steps.nodes[2:]:  # after an empty entry and the frame
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
    # A name or a text in a node may look like the key.
    while (end := plan.rfind(NODES_KEY, HEADER_LENGTH, end)) > data > 0:
        try:
            nodes = msgspec.msgpack.decode(plan[end + len(NODES_KEY) :], type=list[dict[str, Any]])
            root = msgspec.msgpack.decode(b"\x81" + plan[HEADER_LENGTH + 1 : data])
            return Document(slice(data, end), root["root"]["idx"], nodes)
        except msgspec.DecodeError:
            continue
    raise InvalidRequest("this plan is not one that Polars serialized")


def _set_target(payload: Node, temporary_uri: str, part_name: str) -> Sink | None:
    """Settle where one sink writes, if it does."""
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
    """The options that this process's own sink to ``uri`` would have."""
    plan = pl.LazyFrame().sink_parquet(uri, lazy=True).serialize()
    payload = _parse(plan).root_node["Sink"]["payload"]
    options: Node = payload["File"]["unified_sink_args"]["cloud_options"]
    return options
