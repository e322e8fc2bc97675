"""The emulator in a browser: what every cluster did, and each cluster and query by itself."""

import asyncio
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl
from uuid import UUID

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.clusters import Cluster, TerminationReason
from polars_cloud_emulator.model.errors import NotFound, TooLarge, Unauthenticated
from polars_cloud_emulator.model.queries import Query, QueryStatus
from polars_cloud_emulator.model.state import State
from polars_cloud_emulator.planes.credentials_in_urls import without_credentials
from polars_cloud_emulator.planes.first_rows import read_first_rows
from polars_cloud_emulator.planes.timeline import Axis, Interval, Span, total_seconds
from polars_cloud_emulator.protocol.access_tokens import CLIENT_ID, AccessTokens
from polars_cloud_emulator.protocol.device_logins import DeviceLogins
from polars_cloud_emulator.protocol.journal import ADMIN_PREFIX, LOGIN_PREFIX, PORTAL_PREFIX
from polars_cloud_emulator.protocol.request_bodies import MAX_FORM, read_body
from polars_cloud_emulator.workers.compute import Compute

FOLDER = Path(__file__).parent
LONGEST_PLAN = 100_000
"""Characters of a plan that are shown."""
CLUSTERS = 50
"""As many of the latest are shown."""
EXPLAINED_AT_ONCE = 2
"""Plans; each takes a process, and anybody on this machine may ask for it."""
LANES = 30
"""As many queries of a cluster are drawn."""
NAMED_FAILURES = 5
"""As many failed queries of a cluster are named above its drawing."""
ENDS = {
    TerminationReason.STOPPED_BY_USER: "stopped by its user",
    TerminationReason.STOPPED_INACTIVE: "stopped at its idle timeout",
    TerminationReason.FAILED: "failed",
}
WORDS = {
    QueryStatus.SCHEDULED: "waiting",
    QueryStatus.IN_PROGRESS: "running",
    QueryStatus.SUCCESS: "succeeded",
    QueryStatus.FAILED: "failed",
    QueryStatus.CANCELED: "canceled",
}
SYMBOLS = {
    QueryStatus.SCHEDULED: "…",
    QueryStatus.IN_PROGRESS: "▶",
    QueryStatus.SUCCESS: "✓",
    QueryStatus.FAILED: "✗",
    QueryStatus.CANCELED: "⊘",
}
"""For readers who do not see the colors."""
ELSEWHERE = "here: the emulator was started anew or emptied since, or the page is of another one."
RUN_PART = re.compile("run[0-9]+")
SHORTENED = re.compile("~[0-9a-f]{6}$")
"""The end of a label that stands for what was cut off."""
IDENTIFIER = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}


class Lane(NamedTuple):
    """A query below its cluster."""

    query: Query
    name: str
    href: str
    waited: Span
    ran: Span


class Row(NamedTuple):
    """A cluster on the axis."""

    cluster: Cluster
    name: str
    dags: list[str]
    href: str
    starting: Span
    live: Span
    lanes: list[Lane]
    more: int
    """Queries that are not drawn."""
    failures: list[Lane]
    """All failed queries, also those that are not drawn."""
    vcpu_hours: float
    node_seconds: float
    """From the cluster's request to its end. Rounded: what is shown of all rows is their sum."""
    busy: float
    """Those node-seconds in which a query ran."""


class Pages:
    """Server-side HTML, without a login like the admin API, and without a secret.

    Parameters
    ----------
    workspace_id, organization_id
        They stand in the addresses that the client gives to its pages.
    """

    def __init__(
        self,
        state: State,
        compute: Compute,
        clock: Clock,
        access_tokens: AccessTokens,
        device_logins: DeviceLogins,
        *,
        workspace_id: UUID,
        organization_id: UUID,
    ) -> None:
        self._state = state
        self._compute = compute
        self._clock = clock
        self._access_tokens = access_tokens
        self._device_logins = device_logins
        self._workspace_id = workspace_id
        self._organization_id = organization_id
        self._explaining = asyncio.Semaphore(EXPLAINED_AT_ONCE)
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self._templates.globals |= {
            "words": WORDS,
            "symbols": SYMBOLS,
            "named_failures": NAMED_FAILURES,
            "static": f"{ADMIN_PREFIX}static",
        }
        self._templates.filters |= {
            "moment": _moment,
            "seconds": _seconds,
            "count": _count,
            "end": self._end,
        }

    def routes(self) -> list[BaseRoute]:
        workspace = f"{PORTAL_PREFIX}{{workspace:uuid}}"
        return [
            Route("/", self.get_timeline),
            Route(f"{workspace}/{{cluster:uuid}}/queries/{{query:uuid}}", self.get_query),
            Route(
                f"{PORTAL_PREFIX}{{organization:uuid}}/{{workspace:uuid}}/compute/{{cluster:uuid}}",
                self.get_cluster,
            ),
            Route(f"{LOGIN_PREFIX}{{code}}", self.get_login),
            Route(f"{LOGIN_PREFIX}{{code}}", self.confirm_login, methods=["POST"]),
            Mount(f"{ADMIN_PREFIX}static", StaticFiles(directory=FOLDER / "static")),
        ]

    async def get_timeline(self, request: Request) -> Response:
        dag = request.query_params.get("dag", "")
        manifest = request.query_params.get("manifest", "")
        clusters = list(self._state.clusters.by_id.values())
        chosen = [
            cluster
            for cluster in clusters
            if (not manifest or cluster.manifest == manifest)
            and (not dag or dag in self._dags(cluster))
        ]
        shown = chosen[-CLUSTERS:]
        axis = Axis(self._life(cluster) for cluster in shown)
        rows = [self._row(cluster, axis, dag) for cluster in reversed(shown)]
        return self._page(
            "timeline.html",
            rows=rows,
            axis=axis,
            older=len(chosen) - len(shown),
            total={
                column: sum(getattr(row, column) for row in rows)
                for column in ("vcpu_hours", "node_seconds", "busy")
            },
            dag=dag,
            dags=sorted({dag for cluster in clusters for dag in self._dags(cluster)}),
            manifest=manifest,
            manifests=sorted({c.manifest for c in clusters if c.manifest}),
        )

    async def get_cluster(self, request: Request) -> Response:
        try:
            cluster = self._state.clusters.find(request.path_params["cluster"])
        except NotFound as error:
            return self._missing(f"{error} {ELSEWHERE}")
        axis = Axis([self._life(cluster)])
        return self._page("cluster.html", row=self._row(cluster, axis), axis=axis)

    async def get_query(self, request: Request) -> Response:
        try:
            query = self._state.queries.find(request.path_params["query"])
            cluster = self._state.clusters.find(query.cluster_id)
        except NotFound as error:
            return self._missing(f"{error} {ELSEWHERE}")
        async with self._explaining:
            plan = await self._compute.plan_text(query, "plain")
        head = query.outcome.head if query.outcome else None
        first_rows = await asyncio.to_thread(read_first_rows, head) if head else None
        row = self._row(cluster, Axis([self._life(cluster)]))
        return self._page(
            "query.html",
            query=query,
            name=_name(query),
            row=row,
            labels=_joined(_labels(query)),
            first_rows=first_rows,
            plan=plan,
            is_known_error=_reason(query.error) in (plan.error or "") if query.error else False,
            longest=LONGEST_PLAN,
        )

    async def get_login(self, request: Request) -> Response:
        try:
            login = self._device_logins.find(request.path_params["code"])
        except NotFound as error:
            return self._missing(f"{error}.")
        return self._page("login.html", login=login, client_id=CLIENT_ID, error=None)

    async def confirm_login(self, request: Request) -> Response:
        try:
            login = self._device_logins.find(request.path_params["code"])
            form = dict(parse_qsl((await read_body(request, MAX_FORM)).decode(errors="replace")))
            client_id, secret = form.get("client_id", ""), form.get("client_secret", "")
            login.tokens = self._access_tokens.issue_to_person(client_id, secret)
        except (NotFound, TooLarge) as error:
            return self._missing(f"{error}.")
        except Unauthenticated as error:
            return self._page("login.html", 401, login=login, client_id=client_id, error=error)
        return self._page("login.html", login=login, client_id=client_id, error=None)

    def unknown(self, path: str) -> Response:
        """Return a page for an address that no route knows, with a link to what it may mean."""
        words = f"There is no page at {path}."
        for identifier in map(UUID, reversed(IDENTIFIER.findall(path))):
            if query := self._state.queries.by_id.get(identifier):
                words += f" This is the page of the query {_name(query)}:"
                return self._missing(words, self._query_href(query))
            if cluster := self._state.clusters.by_id.get(identifier):
                row = self._row(cluster, Axis([self._life(cluster)]))
                words += f" This is the page of the cluster {row.name}:"
                return self._missing(words, row.href)
        return self._missing(words)

    def _page(self, template: str, status: int = 200, **values: Any) -> Response:
        text = self._templates.get_template(template).render(now=self._clock.now(), **values)
        return HTMLResponse(without_credentials(text), status, HEADERS)

    def _missing(self, words: str, href: str | None = None) -> Response:
        """Say what is not there, and where it may be."""
        words = words[0].upper() + words[1:]
        return self._page("missing.html", 404, words=words, href=href)

    def _row(self, cluster: Cluster, axis: Axis, dag: str = "") -> Row:
        life = self._life(cluster)
        queries = [q for q in self._queries(cluster) if not dag or _labels(q).get("dag") == dag]
        lanes = [self._lane(query, axis) for query in queries]
        spec, seconds = cluster.spec, self._state.clusters.billed_seconds(cluster)
        busy = total_seconds(self._ran(query) for query in queries if query.started_at)
        ready = min(max(cluster.ready_at, life.start), life.end)
        dags = sorted(self._dags(cluster))
        return Row(
            cluster,
            cluster.manifest or ", ".join(dags) or f"cluster {_short(cluster.id)}",
            dags,
            f"{PORTAL_PREFIX}{self._organization_id}/{self._workspace_id}/compute/{cluster.id}",
            axis.span(Interval(life.start, ready)),
            axis.span(life),
            lanes[:LANES],
            len(lanes[LANES:]),
            [lane for lane in lanes if lane.query.status is QueryStatus.FAILED],
            round(seconds * spec.cluster_size * spec.vcpus / 3600, 4),
            round(seconds * spec.cluster_size, 1),
            round(busy * spec.cluster_size, 1),
        )

    def _lane(self, query: Query, axis: Axis) -> Lane:
        ran = self._ran(query)
        return Lane(
            query,
            _name(query),
            self._query_href(query),
            axis.span(Interval(query.submitted_at, ran.start)),
            axis.span(ran),
        )

    def _query_href(self, query: Query) -> str:
        return f"{PORTAL_PREFIX}{self._workspace_id}/{query.cluster_id}/queries/{query.id}"

    def _life(self, cluster: Cluster) -> Interval:
        return Interval(cluster.requested_at, cluster.stopped_at or self._clock.now())

    def _ran(self, query: Query) -> Interval:
        end = query.ended_at or self._clock.now()
        return Interval(query.started_at or end, end)

    def _queries(self, cluster: Cluster) -> Sequence[Query]:
        return [q for q in self._state.queries.by_id.values() if q.cluster_id == cluster.id]

    def _dags(self, cluster: Cluster) -> set[str]:
        labels = (_labels(query) for query in self._queries(cluster))
        return {each["dag"] for each in labels if "dag" in each}

    def _end(self, cluster: Cluster) -> str:
        """Return how a cluster is, or how it ended."""
        if cluster.stopped_at is None:
            return f"{cluster.status.lower()}, still billed"
        assert cluster.termination_reason is not None, "it has stopped"
        end = ENDS[cluster.termination_reason]
        if cluster.termination_reason is TerminationReason.FAILED:
            end += f": {cluster.termination_message}"
        return end


def _labels(query: Query) -> dict[str, str]:
    """Those labels of a query that are a key and a value."""
    pairs: Iterable[list[str]] = (label.split("=", 1) for label in query.labels)
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _joined(labels: dict[str, str]) -> dict[str, str]:
    """Return the labels with the run's id in one piece: ``run2`` and so on continue ``run``."""
    parts = [labels[key] for key in sorted(labels, key=len) if RUN_PART.fullmatch(key)]
    if not parts or not SHORTENED.search(labels.get("run", "")):
        return labels
    run = SHORTENED.sub("", labels["run"]) + "".join(parts)
    others = {key: value for key, value in labels.items() if not RUN_PART.fullmatch(key)}
    return others | {"run": run}


def _reason(error: str) -> str:
    """Return the first line of a query's error, without its type."""
    return error.partition(": ")[2].partition("\n")[0]


def _name(query: Query) -> str:
    """What it is called on a page: its task if its labels tell, and otherwise its id."""
    labels = _labels(query)
    if "task" not in labels:
        return f"query {_short(query.id)}"
    name = labels["task"]
    if "map" in labels:
        name += f"[{labels['map']}]"
    return name if labels.get("try", "1") == "1" else f"{name}, try {labels['try']}"


def _short(identifier: UUID) -> str:
    return str(identifier)[:8]


def _moment(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if moment else "not yet"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s"


def _count(number: int, noun: str, plural: str) -> str:
    return f"{number:,} {noun if number == 1 else plural}"
