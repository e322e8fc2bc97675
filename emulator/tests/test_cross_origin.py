"""Cross-origin requests of web pages are refused."""

import asyncio
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from emulator.tests.raw_calls import (
    COMPUTE_PLANE,
    TOKEN_PATH,
    VERSIONS,
    WORKSPACE,
    access_token,
    basic,
    call_grpc,
    tls_client,
)
from polars_cloud_emulator import server
from polars_cloud_emulator.protocol.access_tokens import DEVICE_PATH
from polars_cloud_emulator.protocol.cross_origin import CrossOriginMiddleware
from polars_cloud_emulator.protocol.journal import LOGIN_PREFIX
from polars_cloud_emulator.testing import RunningEmulator

ANY_ID = "5e41ce00-0000-4000-8000-00000000000f"
STATE = "/_emulator/state"
FORM, GRPC, JSON = (f"application/{name}" for name in ("x-www-form-urlencoded", "grpc", "json"))
SENT_BY_PAGES = [
    {"host": "evil.example"},
    {"host": "evil.example:7410", "origin": "http://evil.example:7410"},
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
    {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
]
"""Headers of a browser for a page of another origin, whose name may resolve to this machine."""
SENT_UNASKED = ["text/plain", "text/plain; application/json", "multipart/form-data; boundary=x"]
"""Content types, besides that of a form, that any page can send without CORS."""

Call = tuple[str, str]
StartEmulator = Callable[..., RunningEmulator]


def takes_form(path: str) -> bool:
    return path in {TOKEN_PATH, DEVICE_PATH} or path.startswith(LOGIN_PREFIX)


@pytest.fixture
def routed(
    emulator_here: StartEmulator, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunningEmulator, list[Call]]:
    """Start an emulator; yield it with method and path of a call to each of its routes."""
    applications: list[Starlette] = []

    class Recorded(Starlette):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            applications.append(self)

    monkeypatch.setattr(server, "Starlette", Recorded)
    emulator = emulator_here()
    calls: list[Call] = []
    for route in applications[0].routes:
        path = re.sub(r"{\w+:\w+}", ANY_ID, route.path)
        if isinstance(route, Mount):
            calls.append(("GET", f"{path}/page.css"))
        else:
            calls += [(method, path) for method in route.methods - {"HEAD"}]
    return emulator, calls


@pytest.fixture(params=["HTTP/1.1", "HTTP/2", "TLS"])
def ask(
    routed: tuple[RunningEmulator, list[Call]], request: pytest.FixtureRequest
) -> Iterator[Callable[..., httpx.Response]]:
    """Send a request like a program with a login, with headers that the test changes."""
    emulator, _ = routed
    admin, bearer = basic(emulator.environment), f"Bearer {access_token(emulator.environment)}"
    is_http2 = request.param == "HTTP/2"
    plain = httpx.Client(
        base_url=emulator.rest_url, http1=not is_http2, http2=is_http2, trust_env=False
    )

    def ask(method: str, path: str, changed: dict[str, str]) -> httpx.Response:
        kind = GRPC if path.startswith("/polars_cloud.") else FORM if takes_form(path) else JSON
        headers = {
            **VERSIONS,
            "authorization": admin if path.startswith("/_emulator/") else bearer,
            "content-type": kind,
            "te": "trailers",
        }
        content = None if method == "GET" else b"{}"
        return client.request(method, path, headers=headers | changed, content=content)

    with plain, tls_client(emulator.environment) as tls:
        client = tls if request.param == "TLS" else plain
        yield ask


def test_no_route_is_open_to_a_web_page(
    routed: tuple[RunningEmulator, list[Call]], ask: Callable[..., httpx.Response]
) -> None:
    emulator, calls = routed
    assert len(calls) > 40
    before = emulator.journal()
    let_in = []
    for call in calls:
        wrong = [*SENT_BY_PAGES]
        if call[0] != "GET":
            wrong += [{"content-type": each} for each in SENT_UNASKED]
            wrong += [{"content-type": FORM}] * (not takes_form(call[1]))
        for headers in wrong:
            answer = ask(*call, headers)
            refused = answer.status_code == (415 if "content-type" in headers else 403)
            # A gRPC error has its status in the trailers; another test checks it.
            if not refused and answer.headers.get("content-type") != GRPC:
                let_in.append((call, headers, answer.status_code, answer.text))
    assert let_in == []
    assert emulator.journal() == before


def test_every_route_is_open_to_a_program_with_a_login(
    routed: tuple[RunningEmulator, list[Call]], ask: Callable[..., httpx.Response]
) -> None:
    _, calls = routed
    for call in calls:
        answer = ask(*call, {})
        assert answer.status_code != 415, call
        assert "not this emulator" not in answer.text, call


def test_grpc_call_of_a_page_is_refused_in_its_own_form(emulator: RunningEmulator) -> None:
    headers = {**VERSIONS, "authorization": f"Bearer {access_token(emulator.environment)}"}
    path = f"{COMPUTE_PLANE}/GetQueryStatus"
    status, message = call_grpc(emulator.environment, path, headers, host="evil.example")
    assert status is grpc.StatusCode.PERMISSION_DENIED
    assert message.startswith("the host 'evil.example' is not this emulator: use 127.0.0.1 or ")
    foreign = {**headers, "origin": "http://evil.example"}
    status, message = call_grpc(emulator.environment, path, foreign)
    assert status is grpc.StatusCode.PERMISSION_DENIED
    assert message.startswith(
        "a page of 'http://evil.example' may not send requests to the emulator"
    )


def answer_to(emulator: RunningEmulator, head: str, until: str = "") -> str:
    """Send a raw request, and return the response up to and including ``until``."""
    address = emulator.rest_url.removeprefix("http://")
    with socket.create_connection(address.split(":"), timeout=30) as connection:
        lines = head.format(address=address).splitlines()
        connection.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
        answer = connection.recv(10_000)
        while until.encode() not in answer:
            answer += connection.recv(10_000)
        return answer.decode(errors="replace")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"GET {STATE} HTTP/1.1\nHost: {{address}}", 200),
        (f"GET {STATE} HTTP/1.1\nHost: LocalHost.:80", 200),
        (f"GET {STATE} HTTP/1.1\nHost: [::1]:1", 200),
        (f"GET {STATE} HTTP/1.1\nHost: evil.example\nX-Forwarded-Host: {{address}}", 403),
        (f"GET {STATE} HTTP/1.1\nHost: evil.example\nForwarded: host={{address}}", 403),
        (f"GET {STATE} HTTP/1.1\nHost: {{address}}@evil.example", 403),
        (f"GET {STATE} HTTP/1.1\nHost: evil.example@{{address}}", 403),
        (f"GET {STATE} HTTP/1.1\nHost:", 403),
        (f"GET {STATE} HTTP/1.1", 400),
        (f"GET {STATE} HTTP/1.0", 403),
        (f"GET {STATE} HTTP/1.1\nHost: {{address}}\nHost: evil.example", 400),
        (f"GET http://evil.example{STATE} HTTP/1.1\nHost: {{address}}", 400),
        (f"GET http://{{address}}{STATE} HTTP/1.1\nHost: {{address}}", 400),
        ("OPTIONS * HTTP/1.1\nHost: {address}", 400),
        (f"GET /{STATE} HTTP/1.1\nHost: {{address}}", 501),
        (
            f"GET {STATE} HTTP/1.1\nHost: {{address}}\nUpgrade: websocket\nConnection: Upgrade\n"
            "Sec-WebSocket-Version: 13\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==",
            403,
        ),
    ],
)
def test_request_is_accepted_by_the_one_name_in_its_host_header(
    emulator: RunningEmulator, head: str, status: int
) -> None:
    assert answer_to(emulator, head).split()[1] == str(status)


def test_upgrade_to_http2_does_not_bypass_the_checks(emulator: RunningEmulator) -> None:
    settings = "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"
    upgrade = f"Upgrade: h2c\nConnection: Upgrade, HTTP2-Settings\n{settings}"
    answers = [
        answer_to(emulator, f"GET {STATE} HTTP/1.1\nHost: {host}\n{upgrade}", until=expected)
        for host, expected in (("{address}", '"clusters"'), ("evil.example", "not this emulator"))
    ]
    assert all(answer.startswith("HTTP/1.1 101") for answer in answers)
    assert '"clusters"' not in answers[1]


@pytest.mark.parametrize(
    ("host", "header", "status"),
    [
        ("emulator", "emulator:7410", 200),
        ("emulator", "EMULATOR", 200),
        ("emulator", "127.0.0.1:8000", 200),
        ("emulator", "172.18.0.3:7410", 200),
        ("emulator", "172.18.0.4:7410", 403),
        ("emulator", "emulator.evil.example", 403),
        ("0.0.0.0", "0.0.0.0:7410", 200),
        ("0.0.0.0", "172.18.0.3:7410", 200),
        ("0.0.0.0", "workstation:7410", 403),
        ("127.0.0.1", f"{ANY_ID}.clusters.polars.test:7411", 200),
        ("127.0.0.1", "evil.clusters.polars.test", 403),
        ("127.0.0.1", f"{ANY_ID}.clusters.polars.test.evil.example", 403),
        ("127.0.0.1", "emulator", 403),
    ],
)
def test_emulator_has_the_names_under_which_it_was_started_and_reached(
    host: str, header: str, status: int
) -> None:
    """As in Docker Compose, where the host name is `emulator` and the address a container's."""
    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "headers": [(b"host", header.encode())],
        "server": ("172.18.0.3", 7410),
    }
    asyncio.run(CrossOriginMiddleware(PlainTextResponse("page"), host)(scope, None, send))  # type: ignore[arg-type]
    assert statuses[0] == status


@pytest.fixture
def browser(emulator: RunningEmulator) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=emulator.rest_url, trust_env=False) as client:
        yield client


def test_link_on_another_page_opens_one_of_the_emulators(browser: httpx.Client) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    opened = browser.get("/", headers=link | {"sec-fetch-dest": "document"})
    assert opened.status_code == 200
    assert browser.get("/", headers=link | {"sec-fetch-dest": "iframe"}).status_code == 403
    assert browser.post("/", headers=link | {"sec-fetch-dest": "document"}).status_code == 403


def test_emulators_own_page_can_send_requests(
    browser: httpx.Client, emulator: RunningEmulator
) -> None:
    own = {"origin": emulator.rest_url.upper(), "sec-fetch-site": "same-origin"}
    assert browser.get("/", headers=own).status_code == 200
    assert browser.post("/", json={}, headers=own).status_code == 501
    other_port = {"origin": "http://127.0.0.1:1"}
    assert browser.get("/", headers=other_port).status_code == 403
    other_scheme = {"origin": emulator.rest_url.replace("http", "https")}
    assert browser.get("/", headers=other_scheme).status_code == 403


@pytest.mark.parametrize("path", ["/", "/_emulator/static/page.js", STATE, "/nothing", "/portal/x"])
@pytest.mark.parametrize("headers", [{}, {"origin": "null"}])
def test_no_response_can_be_framed_or_sniffed(
    browser: httpx.Client, path: str, headers: dict[str, str]
) -> None:
    answer = browser.get(path, headers=headers)
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_call_without_content_needs_a_content_type_or_a_token(
    emulator: RunningEmulator, rest: httpx.Client, browser: httpx.Client
) -> None:
    stop = f"{WORKSPACE}/compute/{ANY_ID}/stop"
    assert rest.post(stop).status_code == 404  # accepted, but the cluster is unknown
    assert browser.post(stop).status_code == 415
    assert rest.post(stop, content=b"{}").status_code == 415
    account = {"authorization": basic(emulator.environment)}
    assert browser.post("/_emulator/reset", headers=account).status_code == 415
    assert browser.delete("/_emulator/faults", headers=account).status_code == 415
