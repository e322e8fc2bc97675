"""The admin API under ``/_emulator/``: look into the emulator, meddle with it and empty it."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.faults.pending import Faults
from polars_cloud_emulator.model.clusters import Cluster
from polars_cloud_emulator.model.errors import CannotPersist, EmulatorError
from polars_cloud_emulator.model.queries import Query
from polars_cloud_emulator.model.state import State
from polars_cloud_emulator.planes.credentials_in_urls import without_credentials
from polars_cloud_emulator.protocol.access_tokens import AccessTokens
from polars_cloud_emulator.protocol.journal import ADMIN_PREFIX, Journal
from polars_cloud_emulator.protocol.request_bodies import MAX_JSON, read_body
from polars_cloud_emulator.protocol.rest_transport import decode_body, json_response, refusal
from polars_cloud_emulator.workers.compute import Compute


class Advance(msgspec.Struct, forbid_unknown_fields=True):
    advance_seconds: Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class NewAccount(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]+\Z")]


class Admin:
    """Anyone may look, since no answer tells a secret; every change needs a service account.

    Parameters
    ----------
    reset
        Stops every cluster and brings the emulator to the state of its first start.
    open_the_shop
        Writes the sample data of a new day.
    """

    def __init__(
        self,
        state: State,
        compute: Compute,
        journal: Journal,
        faults: Faults,
        clock: Clock,
        access_tokens: AccessTokens,
        reset: Callable[[], Awaitable[None]],
        open_the_shop: Callable[[], Awaitable[None]],
    ) -> None:
        self._state = state
        self._compute = compute
        self._journal = journal
        self._faults = faults
        self._clock = clock
        self._access_tokens = access_tokens
        self._reset = reset
        self._open_the_shop = open_the_shop

    def routes(self) -> list[BaseRoute]:
        views = [
            ("health", self.get_health),
            ("state", self.get_state),
            ("journal", self.get_journal),
        ]
        changes = [
            ("POST", "faults", self.post_fault),
            ("DELETE", "faults", self.delete_faults),
            ("POST", "clock", self.post_clock),
            ("POST", "service-accounts", self.post_account),
            ("POST", "reset", self.post_reset),
        ]
        return [
            *(Route(f"{ADMIN_PREFIX}{path}", _shown(view)) for path, view in views),
            *(
                Route(f"{ADMIN_PREFIX}{path}", self._logged_in(change), methods=[method])
                for method, path, change in changes
            ),
        ]

    def _logged_in(
        self, change: Callable[[Request], Awaitable[object]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                self._access_tokens.check_basic(request.headers.get("authorization"))
                return json_response(await change(request))
            except EmulatorError as error:
                return refusal(error)

        return endpoint

    def get_health(self) -> object:
        return {"status": "ready"}

    def get_state(self) -> object:
        return {
            "manifests": sorted(self._state.manifests.by_name),
            "clusters": [self._cluster(c) for c in self._state.clusters.by_id.values()],
            "queries": [self._query(q) for q in self._state.queries.by_id.values()],
            "faults": self._faults.pending,
            "unmatched": self._journal.unmatched,
        }

    def get_journal(self) -> object:
        return list(self._journal.entries)

    async def post_fault(self, request: Request) -> object:
        self._faults.add(await read_body(request, MAX_JSON))
        return self._faults.pending

    async def delete_faults(self, request: Request) -> object:
        self._faults.clear()
        return self._faults.pending

    async def post_clock(self, request: Request) -> object:
        by = await decode_body(request, Advance)
        self._clock.advance(timedelta(seconds=by.advance_seconds))
        # Before the answer: no query after it shall read the data of two days.
        with suppress(CannotPersist):  # it is written as soon as there is room
            await self._open_the_shop()
        return {"now": self._clock.now()}

    async def post_account(self, request: Request) -> object:
        account = await decode_body(request, NewAccount)
        client_id, client_secret = self._access_tokens.add_account(account.name)
        return {"client_id": client_id, "client_secret": client_secret}

    async def post_reset(self, request: Request) -> object:
        await self._reset()
        return {"status": "ready"}

    def _cluster(self, cluster: Cluster) -> dict[str, Any]:
        return {
            "id": cluster.id,
            "manifest": cluster.manifest,
            "status": cluster.status,
            "cluster_size": cluster.spec.cluster_size,
            "vcpus": cluster.spec.vcpus * cluster.spec.cluster_size,
            "idle_timeout_mins": cluster.spec.idle_timeout.total_seconds() / 60,
            "labels": cluster.spec.labels,
            "requested_at": cluster.requested_at,
            "stopped_at": cluster.stopped_at,
            "termination_reason": cluster.termination_reason,
            "billed_seconds": self._state.clusters.billed_seconds(cluster),
            "worker_pids": self._compute.worker_pids(cluster.id),
        }

    def _query(self, query: Query) -> dict[str, Any]:
        return {
            "id": query.id,
            "cluster_id": query.cluster_id,
            "status": query.status,
            "mode": "distributed" if query.distributed else "single_node",
            "engine": query.engine,
            "priority": query.priority,
            "labels": query.labels,
            "lineage": query.lineage,
            "user": query.user,
            "submitted_at": query.submitted_at,
            "started_at": query.started_at,
            "ended_at": query.ended_at,
            "seconds": self._state.queries.seconds(query),
            "cancels": query.cancels,
            "error": query.error,
            "output_location": query.output_location,
            "destinations": query.outcome.destinations if query.outcome else [],
            "n_rows": query.outcome.n_rows if query.outcome else None,
        }


def _shown(view: Callable[[], object]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        text = without_credentials(msgspec.json.encode(view()).decode())
        return Response(text, media_type="application/json")

    return endpoint
