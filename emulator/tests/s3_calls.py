"""Calls to the emulator's S3, with boto3 and as raw requests."""

import http.client
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

BUCKET = "your-bucket"


def s3_client(environment: Mapping[str, str], **changes: str) -> Any:
    """Return a client without retries; ``changes`` are arguments of ``boto3.client``."""
    arguments: dict[str, Any] = {
        "endpoint_url": environment["AWS_ENDPOINT_URL"],
        "aws_access_key_id": environment["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
        "region_name": environment["AWS_REGION"],
        **changes,
    }
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        retries={"total_max_attempts": 1},
    )
    return boto3.client("s3", config=config, **arguments)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    """Headers, with their names in lower case."""
    body: bytes


def connect(environment: Mapping[str, str]) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(environment["AWS_ENDPOINT_URL"]).netloc, timeout=60)


def call(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> Answer:
    """Send a raw request, and read the response."""
    connection.request(method, path, body, dict(headers or {}))
    answer = connection.getresponse()
    names = {name.lower(): value for name, value in answer.getheaders()}
    return Answer(answer.status, names, answer.read())


def signed(
    environment: Mapping[str, str],
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    *,
    payload: str = "UNSIGNED-PAYLOAD",
    service: str = "s3",
) -> dict[str, str]:
    """Return the headers of a request, signed with the emulator's keys."""

    class Signer(S3SigV4Auth):  # type: ignore[misc]
        def payload(self, request: AWSRequest) -> str:
            return payload

    keys = (environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
    url = f"{environment['AWS_ENDPOINT_URL']}{path}"
    request = AWSRequest(method, url, dict(headers or {}))
    Signer(Credentials(*keys), service, environment["AWS_REGION"]).add_auth(request)
    return dict(request.headers)
