"""Requests that the real client would never send: other versions, tokens and bodies."""

import base64
import platform
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import polars as pl

MAJOR, MINOR, PATCH = map(int, platform.python_version_tuple())
CLUSTER = {
    "specs": {"cpus": 2, "ram_gb": 4},
    "cluster_size": 1,
    "mode": "Direct",
    "python_version": {"major": MAJOR, "minor": MINOR, "patch": PATCH},
    "polars_version": pl.__version__,
}
"""A valid body of a start request or, with a name, of a register request."""

VERSIONS = {"x-client-version": "0.12.0", "x-polars-version": pl.__version__}
WORKSPACE = "/api/v1/workspace/5e41ce00-0000-4000-8000-000000000002"
TOKEN_PATH = "/realms/Polars/protocol/openid-connect/token"
COMPUTE_PLANE = "/polars_cloud.compute_plane.client.v1.ClientService"
CONTROL_PLANE = "/polars_cloud.control_plane.client.v1.ClientService"


def tls_client(environment: Mapping[str, str]) -> httpx.Client:
    """Return a client of the TLS port that trusts the emulator's certificate authority."""
    [authority] = Path(environment["SSL_CERT_DIR"]).iterdir()
    return httpx.Client(
        base_url=f"https://{environment['POLARS_CLOUD_DOMAIN'].partition('@')[2]}",
        verify=ssl.create_default_context(cafile=str(authority)),
        trust_env=False,
    )


def access_token(environment: Mapping[str, str]) -> str:
    user = f"{environment['POLARS_CLOUD_CLIENT_ID']}@sa.cloud.pola.rs"
    form = {
        "grant_type": "password",
        "username": user,
        "password": environment["POLARS_CLOUD_CLIENT_SECRET"],
    }
    with tls_client(environment) as client:
        answer = client.post(TOKEN_PATH, data=form)
    return str(answer.raise_for_status().json()["access_token"])


def rest_client(environment: Mapping[str, str]) -> httpx.Client:
    """Return a client of the REST port with all required headers."""
    return httpx.Client(
        base_url=environment["POLARS_CLOUD_API_ADDR"],
        headers={"authorization": f"Bearer {access_token(environment)}", **VERSIONS},
        trust_env=False,
    )


def basic(environment: Mapping[str, str]) -> str:
    """Return the ``authorization`` header with the id and the secret of the service account."""
    names = ("POLARS_CLOUD_CLIENT_ID", "POLARS_CLOUD_CLIENT_SECRET")
    account = ":".join(environment[name] for name in names)
    return f"Basic {base64.b64encode(account.encode()).decode()}"


def admin_client(environment: Mapping[str, str]) -> httpx.Client:
    """Return a client of the admin API with all required headers."""
    return httpx.Client(
        base_url=f"{environment['POLARS_CLOUD_API_ADDR']}/_emulator/",
        headers={"authorization": basic(environment), "content-type": "application/json"},
        trust_env=False,
    )


def call_grpc(
    environment: Mapping[str, str],
    path: str,
    headers: Mapping[str, str],
    message: bytes = b"",
    host: str | None = None,
) -> tuple[grpc.StatusCode, str]:
    """Send a message to ``path`` on the plain port, and return status and text of the response."""
    target = environment["POLARS_CLOUD_API_ADDR"].removeprefix("http://")
    options = [("grpc.enable_http_proxy", 0), ("grpc.default_authority", host or target)]
    with grpc.insecure_channel(target, options=options) as channel:
        call: Any = channel.unary_unary(path, bytes, bytes)
        try:
            call(message, metadata=list(headers.items()), timeout=60)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""
