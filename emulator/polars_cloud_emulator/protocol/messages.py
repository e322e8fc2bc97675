"""The protobuf messages of the compute plane and of the control plane's proxy service.

The field numbers were observed on the wire with ``polars_cloud`` 0.12.0. Fields that the emulator
does not use are not declared; the decoder skips them.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, Self
from uuid import UUID

from pure_protobuf.annotations import Field, uint
from pure_protobuf.message import BaseMessage


class Engine(IntEnum):
    UNSET = 0
    AUTO = 1
    STREAMING = 2
    IN_MEMORY = 3


class ExecuteUntil(IntEnum):
    UNSET = 0
    OPTIMIZE_IR = 1
    PLAN = 2
    EXECUTE = 3


class PreferredFormat(IntEnum):
    """Format of a plan in a request."""

    UNSET = 0
    DOT = 2
    EXPLAIN = 3


class PlanFormat(IntEnum):
    """Format of a plan in a response."""

    DOT = 1
    EXPLAIN = 2


class StatusCode(IntEnum):
    SCHEDULED = 1
    IN_PROGRESS = 2
    SUCCESS = 3
    FAILED = 4
    CANCELED = 5


class FileType(IntEnum):
    UNKNOWN = 0
    PARQUET = 1
    IPC = 2
    CSV = 3
    NDJSON = 4


@dataclass
class Empty(BaseMessage):
    pass


@dataclass
class Id(BaseMessage):
    """QueryId and ComputeId: a UUID as text."""

    value: Annotated[str, Field(1)] = ""


@dataclass
class WorkerCounts(BaseMessage):
    """Arguments of ``distributed(min_workers=, max_workers=)``."""

    least: Annotated[uint | None, Field(1)] = None
    most: Annotated[uint | None, Field(2)] = None


@dataclass
class QuerySettings(BaseMessage):
    """Settings of a query. At most one of ``single`` and ``distributed`` is set."""

    engine: Annotated[Engine, Field(1)] = Engine.UNSET
    single: Annotated[Empty | None, Field(2)] = None
    distributed: Annotated[Empty | None, Field(4)] = None
    plan_format: Annotated[PreferredFormat, Field(5)] = PreferredFormat.UNSET
    optimization_flags: Annotated[uint | None, Field(7)] = None
    workers: Annotated[WorkerCounts, Field(9)] = field(default_factory=WorkerCounts)
    priority: Annotated[int, Field(11)] = 0
    execute_until: Annotated[ExecuteUntil, Field(12)] = ExecuteUntil.UNSET


@dataclass
class Label(BaseMessage):
    name: Annotated[str, Field(1)] = ""


@dataclass
class Lineage(BaseMessage):
    """OpenLineage job of a query, and its parent run."""

    job_namespace: Annotated[str, Field(1)] = ""
    job_name: Annotated[str, Field(2)] = ""
    parent_run_id: Annotated[str, Field(3)] = ""
    parent_job_namespace: Annotated[str, Field(4)] = ""
    parent_job_name: Annotated[str, Field(5)] = ""


@dataclass
class QueryInfo(BaseMessage):
    labels: Annotated[list[Label], Field(1)] = field(default_factory=list)
    lineage: Annotated[Lineage | None, Field(3)] = None


@dataclass
class DirectSubmitRequest(BaseMessage):
    settings: Annotated[QuerySettings, Field(1)] = field(default_factory=QuerySettings)
    plan: Annotated[bytes, Field(2)] = b""
    info: Annotated[QueryInfo, Field(3)] = field(default_factory=QueryInfo)


@dataclass
class ProxySubmitRequest(BaseMessage):
    compute: Annotated[Id, Field(1)] = field(default_factory=Id)
    settings: Annotated[QuerySettings, Field(2)] = field(default_factory=QuerySettings)
    plan: Annotated[bytes, Field(3)] = b""
    info: Annotated[QueryInfo, Field(4)] = field(default_factory=QueryInfo)


@dataclass
class QueryReference(BaseMessage):
    """Any request or response whose only content is a query id."""

    query: Annotated[Id, Field(1)] = field(default_factory=Id)

    @classmethod
    def of(cls, query_id: UUID) -> Self:
        return cls(Id(str(query_id)))


@dataclass
class QueryStatusResponse(BaseMessage):
    status: Annotated[StatusCode, Field(1)]


@dataclass
class QueryError(BaseMessage):
    """``message`` is a JSON object: the failure by the component that reported it."""

    message: Annotated[str, Field(1)] = ""


@dataclass
class Destination(BaseMessage):
    uri: Annotated[str, Field(1)] = ""


@dataclass
class Output(BaseMessage):
    destinations: Annotated[list[Destination], Field(1)] = field(default_factory=list)
    file_type: Annotated[FileType, Field(2)] = FileType.UNKNOWN
    n_rows: Annotated[uint, Field(3)] = uint(0)  # noqa: RUF009 (an int)


@dataclass
class QueryResult(BaseMessage):
    total_stages: Annotated[uint, Field(1)] = uint(0)  # noqa: RUF009
    finished_stages: Annotated[uint, Field(2)] = uint(0)  # noqa: RUF009
    failed_stages: Annotated[uint, Field(3)] = uint(0)  # noqa: RUF009
    errors: Annotated[list[QueryError], Field(4)] = field(default_factory=list)
    output: Annotated[Output | None, Field(5)] = None


@dataclass
class Head(BaseMessage):
    """The first rows of a result as an Arrow IPC file."""

    data: Annotated[bytes | None, Field(1)] = None


@dataclass
class DirectQueryResultResponse(BaseMessage):
    """``result`` and ``head`` may be empty, but the client fails if they are missing."""

    result: Annotated[QueryResult, Field(1)]
    head: Annotated[Head, Field(2)]
    status: Annotated[StatusCode, Field(3)]


@dataclass
class ProxyQueryResultResponse(BaseMessage):
    result: Annotated[QueryResult, Field(1)]


@dataclass
class FieldMask(BaseMessage):
    paths: Annotated[list[str], Field(1)] = field(default_factory=list)


@dataclass
class PlansRequest(BaseMessage):
    query: Annotated[Id, Field(1)] = field(default_factory=Id)
    mask: Annotated[FieldMask, Field(2)] = field(default_factory=FieldMask)


@dataclass
class Plans(BaseMessage):
    """``ir`` is the optimized plan, in the format that the submission asked for."""

    format: Annotated[PlanFormat, Field(1)]
    ir: Annotated[str, Field(2)]


@dataclass
class PlansResponse(BaseMessage):
    plans: Annotated[Plans, Field(2)]


@dataclass
class ComputeVersions(BaseMessage):
    compute_plane: Annotated[str, Field(1)] = ""
    polars_python: Annotated[str, Field(2)] = ""
    polars_rust: Annotated[str, Field(3)] = ""


@dataclass
class ComputeVersionsResponse(BaseMessage):
    versions: Annotated[ComputeVersions, Field(1)]
