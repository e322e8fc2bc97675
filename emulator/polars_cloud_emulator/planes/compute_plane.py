"""The compute planes of all clusters on one port: scheduler (gRPC) and observatory (REST)."""

import platform
from collections.abc import Callable
from typing import Any
from uuid import UUID

import polars as pl
from pure_protobuf.message import BaseMessage
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from polars_cloud_emulator.model.errors import (
    DeadlineExceeded,
    EmulatorError,
    NotFound,
    PermissionDenied,
    Unavailable,
    WrongState,
)
from polars_cloud_emulator.model.state import State
from polars_cloud_emulator.planes.query_messages import (
    ENGINE_NAMES,
    NO_PHYSICAL_PLAN,
    QUERY_TYPE_NAMES,
    STATUS_CODES,
    parse_id,
    query_result,
    submit,
)
from polars_cloud_emulator.protocol.client_check import CLIENT_VERSION, ClientCheck
from polars_cloud_emulator.protocol.grpc_transport import grpc_route, seconds_left
from polars_cloud_emulator.protocol.messages import (
    ComputeVersions,
    ComputeVersionsResponse,
    DirectQueryResultResponse,
    DirectSubmitRequest,
    Empty,
    Head,
    PlanFormat,
    Plans,
    PlansRequest,
    PlansResponse,
    QueryReference,
    QueryStatusResponse,
)
from polars_cloud_emulator.protocol.rest_transport import json_response, refusal
from polars_cloud_emulator.storage.persisted_plans import PersistedPlans
from polars_cloud_emulator.workers.compute import Compute

SERVICE = "/polars_cloud.compute_plane.client.v1.ClientService"
PLAN_FORMATS = {"dot": PlanFormat.DOT, "plain": PlanFormat.EXPLAIN}
MAX_WAIT = 30.0
"""Seconds until a waiting request is answered with UNAVAILABLE; the client retries in 1 s."""
RESPONSE_MARGIN = 0.5
"""Seconds before the client's own timeout at which DEADLINE_EXCEEDED is sent."""


class ComputePlane:
    """Scheduler and observatory.

    The first label of a request's host name is its cluster's id. On premises there is one cluster.
    """

    def __init__(
        self,
        state: State,
        compute: Compute,
        plans: PersistedPlans,
        check_authorization: Callable[[str | None], object],
        check_client: ClientCheck,
        *,
        on_premises: bool,
    ) -> None:
        self._state = state
        self._compute = compute
        self._plans = plans
        self._check_authorization = check_authorization
        self._on_premises = on_premises
        self._check_client = check_client

    def routes(self) -> list[Route]:
        check = self._check_client
        return [
            grpc_route(f"{SERVICE}/SubmitQuery", check, DirectSubmitRequest, self.submit_query),
            grpc_route(f"{SERVICE}/GetQueryStatus", check, QueryReference, self.get_query_status),
            grpc_route(f"{SERVICE}/GetQueryResult", check, QueryReference, self.get_query_result),
            grpc_route(f"{SERVICE}/GetQueryPlans", check, PlansRequest, self.get_query_plans),
            grpc_route(f"{SERVICE}/CancelQuery", check, QueryReference, self.cancel_query),
            grpc_route(
                f"{SERVICE}/DeleteQueryResult", check, QueryReference, self.delete_query_result
            ),
            grpc_route(f"{SERVICE}/GetComputeVersions", check, Empty, self.get_compute_versions),
            Route("/api/v1/query/{query_id:uuid}", self.get_query_details),
        ]

    async def submit_query(self, message: DirectSubmitRequest, request: Request) -> BaseMessage:
        cluster_id = self._find_cluster(request.headers.get("host", ""))
        query = await submit(self._state, self._compute, self._plans, cluster_id, message, request)
        return QueryReference.of(query.id)

    def _find_cluster(self, host: str) -> UUID:
        if self._on_premises:
            [cluster] = (each for each in self._state.clusters.by_id.values() if each.is_live)
            return cluster.id
        try:
            return UUID(host.partition(".")[0])
        except ValueError:
            raise NotFound(
                f"the host '{host}' does not name a cluster; use a ComputeContext"
            ) from None

    async def get_query_status(self, message: QueryReference, request: Request) -> BaseMessage:
        return QueryStatusResponse(
            STATUS_CODES[self._state.queries.find(parse_id(message.query)).status]
        )

    async def get_query_result(self, message: QueryReference, request: Request) -> BaseMessage:
        query = self._state.queries.find(parse_id(message.query))
        # After its own deadline the client would report a broken call instead of a timeout.
        asked = seconds_left(request) or MAX_WAIT * 2
        deadline = asked - min(asked / 2, RESPONSE_MARGIN)
        if not await self._compute.wait_for_end(query.id, min(deadline, MAX_WAIT)):
            if deadline <= MAX_WAIT:
                raise DeadlineExceeded(f"query {query.id} has not ended")
            raise Unavailable(f"query {query.id} has not ended; retry")
        return DirectQueryResultResponse(
            query_result(query),
            Head(query.outcome.head if query.outcome else None),
            STATUS_CODES[query.status],
        )

    async def get_query_plans(self, message: PlansRequest, request: Request) -> BaseMessage:
        query = self._state.queries.find(parse_id(message.query))
        if message.mask.paths != ["plans.ir"]:
            raise PermissionDenied(f"{NO_PHYSICAL_PLAN} plan_type='ir'")
        plan = query.outcome.ir_plan if query.outcome else None
        if plan is None:
            text = await self._compute.plan_text(query, query.plan_format)
            if text.optimized is None:
                raise WrongState(text.error or "")
            plan = text.optimized
        return PlansResponse(Plans(PLAN_FORMATS[query.plan_format], plan))

    async def cancel_query(self, message: QueryReference, request: Request) -> BaseMessage:
        self._compute.cancel(parse_id(message.query))
        return Empty()

    async def delete_query_result(self, message: QueryReference, request: Request) -> BaseMessage:
        await self._compute.delete_result(parse_id(message.query))
        return Empty()

    async def get_compute_versions(self, message: Empty, request: Request) -> BaseMessage:
        return ComputeVersionsResponse(
            ComputeVersions(
                compute_plane=f"emulator for polars_cloud {CLIENT_VERSION}",
                polars_python=pl.__version__,
                polars_rust=f"Python {platform.python_version()}",
            )
        )

    async def get_query_details(self, request: Request) -> Response:
        try:
            self._check_authorization(request.headers.get("authorization"))
            query = self._state.queries.find(request.path_params["query_id"])
        except EmulatorError as error:
            return refusal(error)
        details: dict[str, Any] = {
            "id": str(query.id),
            "user": {"name": query.user or "emulator"},
            "status": query.status,
            "request_time": query.submitted_at,
            "start_time": query.started_at,
            "end_time": query.ended_at,
            "query_plan_timing": {
                f"{step}_time": None
                for step in (
                    "plan_start",
                    "parse_start",
                    "optimize_start",
                    "distribute_start",
                    "distribute_end",
                    "plan_end",
                )
            },
            "total_num_stages": 1,
            "in_progress_stages": [] if query.ended_at else [0],
            "finished_stages": [0] if query.outcome else [],
            "total_node_time_ns": int(self._state.queries.seconds(query) * 1e9),
            "engine": ENGINE_NAMES[query.engine],
            "query_type": QUERY_TYPE_NAMES[query.distributed],
            "output_rows": query.outcome.n_rows if query.outcome else None,
        }
        return json_response(details)
