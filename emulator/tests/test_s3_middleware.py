"""Access to the emulator's S3, and its error responses."""

import contextlib
import http.client
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl
import pytest
from botocore import auth
from botocore.exceptions import ClientError

from emulator.tests.command_line import Served
from emulator.tests.s3_calls import BUCKET, Answer, call, connect, s3_client, signed
from polars_cloud_emulator.testing import RunningEmulator

OBJECT = f"/{BUCKET}/x"
GIBIBYTE = 2**30


@pytest.fixture
def environment(emulator: RunningEmulator) -> dict[str, str]:
    return emulator.environment


@pytest.fixture
def connection(environment: dict[str, str]) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(connect(environment)) as connection:
        yield connection


@pytest.fixture
def s3(environment: dict[str, str]) -> Iterator[Any]:
    with contextlib.closing(s3_client(environment)) as client:
        client.put_object(Bucket=BUCKET, Key="x", Body=b"mine")
        yield client


def code_of(answer: Answer) -> str:
    [code] = re.findall("<Code>(.*)</Code>", answer.body.decode())
    return str(code)


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"aws_access_key_id": "another"}, "InvalidAccessKeyId"),
        ({"aws_secret_access_key": "another"}, "SignatureDoesNotMatch"),
        ({"aws_session_token": "of a user"}, "InvalidToken"),
    ],
)
def test_request_that_is_not_signed_with_the_emulators_keys_is_refused(
    environment: dict[str, str], changes: dict[str, str], code: str
) -> None:
    client = s3_client(environment, **changes)
    with pytest.raises(ClientError, match=code):
        client.get_object(Bucket=BUCKET, Key="x")
    with pytest.raises(ClientError, match=code):
        client.put_object(Bucket=BUCKET, Key="x", Body=b"theirs")


@pytest.mark.parametrize("minutes", [-16, 16])
def test_request_of_another_time_is_refused(
    s3: Any, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    then = datetime.now(UTC) + timedelta(minutes=minutes)
    monkeypatch.setattr(auth, "get_current_datetime", lambda: then)
    with pytest.raises(ClientError, match="RequestTimeTooSkewed"):
        s3.get_object(Bucket=BUCKET, Key="x")


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 403, "AccessDenied"),
        ({"authorization": "Bearer token"}, 400, "InvalidRequest"),
        ({"authorization": "AWS emulator:signature"}, 400, "InvalidRequest"),
        ({"authorization": "AWS4-HMAC-SHA256"}, 400, "AuthorizationHeaderMalformed"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_request_without_a_signature_is_refused(
    connection: http.client.HTTPConnection,
    method: str,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    answer = call(connection, method, "/your-bucket/sales/", headers)
    assert (answer.status, code_of(answer)) == (status, code)


def test_signature_is_valid_only_for_what_was_signed(
    environment: dict[str, str], connection: http.client.HTTPConnection
) -> None:
    headers = signed(environment, "GET", OBJECT)
    assert call(connection, "GET", OBJECT, headers).status == 404
    for method, path, more, code in [
        ("PUT", OBJECT, {}, "SignatureDoesNotMatch"),
        ("GET", f"/{BUCKET}/y", {}, "SignatureDoesNotMatch"),
        ("GET", f"{OBJECT}?acl", {}, "SignatureDoesNotMatch"),
        ("GET", OBJECT, {"X-Amz-Content-SHA256": "0" * 64}, "SignatureDoesNotMatch"),
        ("GET", OBJECT, {"x-amz-meta-more": "unsigned"}, "AccessDenied"),
    ]:
        assert code_of(call(connection, method, path, {**headers, **more})) == code


@pytest.mark.parametrize("value", ["", "other", "0" * 63])
def test_request_with_a_malformed_body_hash_is_refused(
    environment: dict[str, str], connection: http.client.HTTPConnection, value: str
) -> None:
    headers = signed(environment, "PUT", OBJECT, payload=value)
    assert code_of(call(connection, "PUT", OBJECT, headers, b"x")) == "InvalidRequest"


def test_body_that_was_not_signed_is_refused(
    environment: dict[str, str], connection: http.client.HTTPConnection, s3: Any
) -> None:
    headers = signed(environment, "PUT", OBJECT, payload="0" * 64)
    answer = call(connection, "PUT", OBJECT, headers, b"theirs")
    assert code_of(answer) == "XAmzContentSHA256Mismatch"
    assert s3.get_object(Bucket=BUCKET, Key="x")["Body"].read() == b"mine"


def test_presigned_url_is_valid_for_its_request_until_it_expires(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = {"Bucket": BUCKET, "Key": "ä b/=1&c"}
    put = s3.generate_presigned_url("put_object", target, ExpiresIn=60)
    get = s3.generate_presigned_url("get_object", target, ExpiresIn=60)

    def send(url: str, method: str = "GET", body: bytes | None = None) -> bytes:
        request = urllib.request.Request(url, body, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            content: bytes = opener.open(request).read()
        except urllib.error.HTTPError as error:
            content = error.read()
        return content

    assert send(put, "PUT", b"content") == b""
    assert send(get) == b"content"
    assert b"SignatureDoesNotMatch" in send(get, "PUT", b"other")
    assert b"SignatureDoesNotMatch" in send(get.replace("Expires=60", "Expires=600"))
    assert b"SignatureDoesNotMatch" in send(get.replace("b/%3D1", "b/%3D2"))
    assert b"AuthorizationQueryParametersError" in send(get.replace("Expires=60", "Expires=0"))
    then = datetime.now(UTC) - timedelta(seconds=61)
    monkeypatch.setattr(auth, "get_current_datetime", lambda: then)
    expired = s3.generate_presigned_url("get_object", target, ExpiresIn=60)
    assert b"Request has expired" in send(expired)


def test_presigned_url_of_the_second_version_is_refused(
    connection: http.client.HTTPConnection,
) -> None:
    answer = call(connection, "GET", f"{OBJECT}?AWSAccessKeyId=emulator&Expires=1&Signature=x")
    assert code_of(answer) == "InvalidRequest"
    assert b"Please use AWS4-HMAC-SHA256" in answer.body


def test_sink_with_other_keys_fails(start_cluster: Callable[..., Any]) -> None:
    options = {"aws_access_key_id": "another", "aws_secret_access_key": "another"}
    remote = pl.LazyFrame({"x": [1]}).remote(start_cluster())
    query = remote.sink_parquet(f"s3://{BUCKET}/x/", storage_options=options)
    with pytest.raises(PermissionError, match="InvalidAccessKeyId"):
        query.await_result()


def test_each_state_directory_has_keys_of_its_own(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    def keys(name: str) -> tuple[str, str]:
        served = serve("--port-base", 0, "--state-dir", tmp_path / name)
        assert served.stop() == (0, "", "")
        environment = served.environment
        return environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]

    first = keys("first")
    assert keys("first") == first
    assert keys("second") != first
    assert len(first[1]) > 30


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/moto-api/reset"),
        ("GET", "/moto-api/recorder/start-recording"),
        ("GET", "/moto-api/data.json"),
        ("GET", "/latest/meta-data/iam/security-credentials/"),
        ("GET", "/us-east-1_x/.well-known/jwks.json"),
    ],
)
def test_no_other_service_answers_on_the_s3_port(
    environment: dict[str, str], connection: http.client.HTTPConnection, method: str, path: str
) -> None:
    assert call(connection, method, path).status == 404
    assert call(connection, method, path, signed(environment, method, path)).status == 404
    for service in ("sts", "iam", "lambda", "s3vectors"):
        headers = signed(environment, "POST", "/", service=service)
        assert call(connection, "POST", "/", headers).status == 404
    assert pl.scan_parquet("s3://your-bucket/sales/").select(pl.len()).collect().item() > 0


@pytest.mark.parametrize("host", ["evil.example", f"{BUCKET}.localhost", "192.0.2.1", ""])
def test_host_of_another_machine_or_of_a_bucket_is_refused(
    environment: dict[str, str], connection: http.client.HTTPConnection, host: str
) -> None:
    headers = signed(environment, "GET", OBJECT, {"host": host})
    answer = call(connection, "GET", OBJECT, headers)
    assert (answer.status, code_of(answer)) == (403, "AccessDenied")
    assert b"is not this emulator" in answer.body


def test_every_name_of_this_machine_leads_to_the_s3(
    environment: dict[str, str], connection: http.client.HTTPConnection
) -> None:
    for host in ("localhost", "127.0.0.1:1", "[::1]:9"):
        headers = signed(environment, "GET", "/your-bucket?location=", {"host": host})
        assert call(connection, "GET", "/your-bucket?location=", headers).status == 200


def test_no_web_page_may_read_an_answer(
    environment: dict[str, str], connection: http.client.HTTPConnection, s3: Any
) -> None:
    page = {"origin": "https://evil.example", "access-control-request-method": "PUT"}
    for method in ("GET", "HEAD", "PUT", "OPTIONS"):
        for headers in (page, page | signed(environment, method, OBJECT)):
            answer = call(connection, method, OBJECT, headers)
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("length", "status", "code"),
    [
        (5 * GIBIBYTE + 1, 400, "EntityTooLarge"),
        (10**14, 400, "EntityTooLarge"),
        (None, 411, "MissingContentLength"),
    ],
)
def test_body_that_is_too_large_for_s3_is_refused_before_it_is_sent(
    environment: dict[str, str],
    connection: http.client.HTTPConnection,
    length: int | None,
    status: int,
    code: str,
) -> None:
    headers = signed(environment, "PUT", OBJECT)
    connection.putrequest("PUT", OBJECT, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if length is not None:
        connection.putheader("content-length", str(length))
    connection.endheaders()
    answer = connection.getresponse()
    refusal = Answer(answer.status, {}, answer.read())
    assert (refusal.status, code_of(refusal)) == (status, code)


@pytest.mark.parametrize(
    "headers", ["content-length: 1\r\ncontent-length: 2", "content-length: -1"]
)
def test_request_of_ambiguous_length_is_refused(environment: dict[str, str], headers: str) -> None:
    address = urlsplit(environment["AWS_ENDPOINT_URL"])
    with socket.create_connection((address.hostname, address.port), timeout=60) as raw:
        raw.sendall(f"PUT {OBJECT} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n\r\n".encode())
        with raw.makefile("rb") as answer:
            assert answer.read().startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("key", "status"),
    [
        ("..", 200),
        ("../../../x", 200),
        ("a/../../../../x", 200),
        ("%00", 200),
        ("a%00b", 200),
        ("%5C..%5C", 200),
        ("%F0%9F%98%80%EF%BF%BF", 200),
        ("k" * 1024, 200),
        ("k" * 1025, 400),
        ("%C3%BC" * 513, 400),
        ("%FF", 400),
        ("%ED%A0%80", 400),
    ],
)
def test_object_of_any_key_is_stored_in_the_state_directory_or_refused(
    emulator: RunningEmulator,
    connection: http.client.HTTPConnection,
    key: str,
    status: int,
) -> None:
    state = Path(emulator.environment["POLARS_CLOUD_CONFIG_DIR"]).parent
    around = [state.parent, state, state / "buckets"]
    before = [{*folder.iterdir()} for folder in around]
    path = f"/{BUCKET}/{key}"
    put = call(connection, "PUT", path, signed(emulator.environment, "PUT", path), b"content")
    assert put.status == status
    if status == 200:
        got = call(connection, "GET", path, signed(emulator.environment, "GET", path))
        assert got.body == b"content"
    assert [{*folder.iterdir()} for folder in around] == before


def test_call_that_moto_does_not_support_is_refused_with_a_clear_error(
    environment: dict[str, str], connection: http.client.HTTPConnection
) -> None:
    for method, path in [("PATCH", OBJECT), ("GET", f"/{BUCKET}?list-type=2&max-keys=some")]:
        answer = call(connection, method, path, signed(environment, method, path))
        assert (answer.status, code_of(answer)) == (501, "NotImplemented")
        assert b"The emulator's S3 cannot do this (" in answer.body


def test_connection_serves_many_requests_also_after_a_refusal(
    environment: dict[str, str], connection: http.client.HTTPConnection
) -> None:
    connection.connect()
    opened = connection.sock
    for _ in range(3):
        assert call(connection, "PUT", OBJECT, body=b"unsigned" * 100_000).status == 403
        headers = signed(environment, "PUT", OBJECT)
        assert call(connection, "PUT", OBJECT, headers, b"signed").status == 200
        assert call(connection, "GET", OBJECT, signed(environment, "GET", OBJECT)).body == b"signed"
        assert call(connection, "HEAD", OBJECT, signed(environment, "HEAD", OBJECT)).body == b""
        deleted = call(connection, "DELETE", OBJECT, signed(environment, "DELETE", OBJECT))
        assert deleted.status == 204
    assert connection.sock is opened


def test_reset_restores_the_buckets(emulator: RunningEmulator, s3: Any) -> None:
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    s3.create_bucket(Bucket="of-a-test")
    s3.put_object(Bucket="of-a-test", Key="x", Body=b"x")
    s3.delete_bucket(Bucket="polars-cloud-temporary")
    emulator.reset()
    buckets = {each["Name"] for each in s3.list_buckets()["Buckets"]}
    assert buckets == {BUCKET, "polars-cloud-temporary"}
    s3.create_bucket(Bucket="of-a-test")
    assert "Status" not in s3.get_bucket_versioning(Bucket=BUCKET)
    for entry in s3.list_objects_v2(Bucket=BUCKET)["Contents"]:
        s3.delete_object(Bucket=BUCKET, Key=entry["Key"])
    s3.delete_bucket(Bucket=BUCKET)
    emulator.reset()
    assert pl.scan_parquet("s3://your-bucket/sales/").select(pl.len()).collect().item() > 0
