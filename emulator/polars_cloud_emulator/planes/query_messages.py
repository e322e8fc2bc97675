"""Conversion of queries between protocol and state, for direct and proxy mode alike."""

import asyncio
from dataclasses import asdict
from uuid import UUID, uuid4

import msgspec
from starlette.requests import Request

from polars_cloud_emulator.model.errors import EmulatorError, InvalidRequest, WrongState
from polars_cloud_emulator.model.queries import Query, QueryStatus
from polars_cloud_emulator.model.state import State
from polars_cloud_emulator.model.texts import check_labels
from polars_cloud_emulator.protocol.messages import (
    Destination,
    DirectSubmitRequest,
    Engine,
    ExecuteUntil,
    FileType,
    Id,
    Output,
    PreferredFormat,
    ProxySubmitRequest,
    QueryError,
    QueryResult,
    StatusCode,
    WorkerCounts,
)
from polars_cloud_emulator.storage.persisted_plans import PersistedPlans
from polars_cloud_emulator.workers import plan, submission
from polars_cloud_emulator.workers.compute import Compute
from polars_cloud_emulator.workers.redacted_plan import without_secrets

STATUS_CODES = {
    QueryStatus.SCHEDULED: StatusCode.SCHEDULED,
    QueryStatus.IN_PROGRESS: StatusCode.IN_PROGRESS,
    QueryStatus.SUCCESS: StatusCode.SUCCESS,
    QueryStatus.FAILED: StatusCode.FAILED,
    QueryStatus.CANCELED: StatusCode.CANCELED,
}
FILE_TYPES = {
    None: FileType.UNKNOWN,
    "parquet": FileType.PARQUET,
    "ipc": FileType.IPC,
    "csv": FileType.CSV,
    "ndjson": FileType.NDJSON,
}
HOW_TO_SUBMIT = {
    "Direct": "submit to its scheduler",
    "Proxy": "it has no open port; submit to the control plane",
}
"""How to submit a query to a cluster of each mode."""
NO_PHYSICAL_PLAN = (
    "the emulator has no physical plan, because one worker runs the whole query; "
    "request the optimized plan with"
)
QUERY_TYPE_NAMES = {False: "Single", True: "Distributed"}
ENGINE_NAMES = {"streaming": "Streaming", "in-memory": "InMemory"}


def parse_id(message: Id) -> UUID:
    try:
        return UUID(message.value)
    except ValueError:
        raise InvalidRequest(f"'{message.value}' is not a UUID") from None


async def submit(
    state: State,
    compute: Compute,
    plans: PersistedPlans,
    cluster_id: UUID,
    message: DirectSubmitRequest | ProxySubmitRequest,
    request: Request,
) -> Query:
    """Submit the query of a message.

    Raises
    ------
    InvalidRequest
        The query cannot run on its cluster, or its result would be lost.
    CannotPersist
        The query cannot be written to disk.
    """
    settings = message.settings
    if settings.execute_until is ExecuteUntil.PLAN:
        raise InvalidRequest(f"{NO_PHYSICAL_PLAN} plan_stage='ir'")
    if not -(2**31) <= (settings.priority or 0) < 2**31:
        raise InvalidRequest("priority must be a 32-bit integer")
    if (settings.optimization_flags or 0) >= 2**32:
        raise InvalidRequest("optimization_flags must fit into 32 bits")
    _check_workers(settings.workers)
    labels = [label.name for label in message.info.labels]
    check_labels(labels)
    only_planned = settings.execute_until is ExecuteUntil.OPTIMIZE_IR
    spec = state.clusters.find(cluster_id).spec
    mode = "Direct" if isinstance(message, DirectSubmitRequest) else "Proxy"
    if spec.mode != mode:
        raise WrongState(
            f"cluster {cluster_id} is in {spec.mode.lower()} mode: {HOW_TO_SUBMIT[spec.mode]}"
        )
    try:
        document = plan.parse(message.plan)
        submission.check(document, spec, only_planned=only_planned)
        output_location = plan.output_location(document)
        redacted = without_secrets(message.plan, document)
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, RecursionError):
        raise InvalidRequest("the plan cannot be decoded: it was damaged in transit") from None
    query_id = uuid4()
    # Written first, because another call may start the query as soon as it is submitted.
    await asyncio.to_thread(plans.store, query_id, message.plan, redacted=redacted)
    try:
        return compute.submit(
            lambda: state.submit(
                cluster_id,
                query_id=query_id,
                output_location=None if only_planned else output_location,
                distributed=settings.single is None,
                min_workers=settings.workers.least,
                max_workers=settings.workers.most,
                engine="in-memory" if settings.engine is Engine.IN_MEMORY else "streaming",
                optimization_flags=settings.optimization_flags,
                plan_format="plain" if settings.plan_format is PreferredFormat.EXPLAIN else "dot",
                only_planned=only_planned,
                priority=settings.priority or 0,
                labels=labels,
                lineage=asdict(message.info.lineage) if message.info.lineage else None,
                user=request.headers.get("x-polars-user"),
            ),
            request.scope["fault"],
        )
    except EmulatorError:
        plans.delete(query_id)
        raise


def _check_workers(workers: WorkerCounts) -> None:
    for option, count in (("min_workers", workers.least), ("max_workers", workers.most)):
        if count is not None and not 1 <= count < 2**32:
            raise InvalidRequest(f"{option} must be from 1 to {2**32 - 1}, not {count}")
    if workers.least and workers.most and workers.least > workers.most:
        raise InvalidRequest(
            f"min_workers ({workers.least}) must not be greater than max_workers ({workers.most})"
        )


def query_result(query: Query) -> QueryResult:
    """Return the result message of a query. It has one stage, because one worker runs the plan."""
    result = QueryResult(total_stages=1)  # type: ignore[arg-type]
    if query.outcome is not None and not query.only_planned:
        result.finished_stages = 1  # type: ignore[assignment]
        result.output = Output(
            [Destination(uri) for uri in query.outcome.destinations],
            FILE_TYPES[query.outcome.file_type],
            query.outcome.n_rows,  # type: ignore[arg-type]
        )
    if query.error is not None:
        result.failed_stages = 1  # type: ignore[assignment]
        # The client raises the error under this key.
        message = msgspec.json.encode({"scheduler": query.error}).decode()
        result.errors = [QueryError(message)]
    return result
