"""The admin API under ``/_emulator/``: look into the emulator and empty it."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from polars_cloud_emulator.compute import Compute
from polars_cloud_emulator.journal import ADMIN_PREFIX, Journal
from polars_cloud_emulator.rest_transport import json_response
from polars_cloud_emulator.state import Cluster, Query, State


class Admin:
    """No login: what it shows holds no secret, and the emulator listens on loopback by default.

    Parameters
    ----------
    reset
        Stops every cluster and brings the emulator to the state of its first start.
    """

    def __init__(
        self,
        state: State,
        compute: Compute,
        journal: Journal,
        reset: Callable[[], Awaitable[None]],
    ) -> None:
        self._state = state
        self._compute = compute
        self._journal = journal
        self._reset = reset

    def routes(self) -> list[BaseRoute]:
        return [
            Route(f"{ADMIN_PREFIX}health", self.get_health),
            Route(f"{ADMIN_PREFIX}state", self.get_state),
            Route(f"{ADMIN_PREFIX}journal", self.get_journal),
            Route(f"{ADMIN_PREFIX}reset", self.post_reset, methods=["POST"]),
        ]

    async def get_health(self, request: Request) -> Response:
        return json_response({"status": "ready"})

    async def get_state(self, request: Request) -> Response:
        return json_response(
            {
                "manifests": sorted(self._state.manifests),
                "clusters": [self._cluster(c) for c in self._state.clusters.values()],
                "queries": [self._query(q) for q in self._state.queries.values()],
                "unmatched": self._journal.unmatched,
            }
        )

    async def get_journal(self, request: Request) -> Response:
        return json_response(list(self._journal.entries))

    async def post_reset(self, request: Request) -> Response:
        await self._reset()
        return json_response({"status": "ready"})

    def _cluster(self, cluster: Cluster) -> dict[str, Any]:
        return {
            "id": cluster.id,
            "manifest": cluster.manifest,
            "status": cluster.status,
            "cluster_size": cluster.spec.cluster_size,
            "idle_timeout_mins": cluster.spec.idle_timeout.total_seconds() / 60,
            "labels": cluster.spec.labels,
            "requested_at": cluster.requested_at,
            "stopped_at": cluster.stopped_at,
            "termination_reason": cluster.termination_reason,
            "billed_seconds": self._state.billed_seconds(cluster),
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
            "user": query.user,
            "submitted_at": query.submitted_at,
            "started_at": query.started_at,
            "ended_at": query.ended_at,
            "seconds": self._state.query_seconds(query),
            "error": query.error,
            "destinations": query.outcome.destinations if query.outcome else [],
            "n_rows": query.outcome.n_rows if query.outcome else None,
        }
