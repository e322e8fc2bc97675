"""Plain reads, which moto does not handle, have the same responses as moto's."""

import contextlib
import socket
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from emulator.tests.s3_calls import BUCKET, Answer, call, connect, s3_client, signed
from polars_cloud_emulator.storage import plain_reads
from polars_cloud_emulator.storage.object_store import ObjectStore

CONTENT = bytes(range(100))
TIMES_AND_IDS = {"date", "x-amzn-requestid", "x-amz-content-sha256"}
"""Headers that differ each time, or that moto copies from the writing request."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("buckets")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = ObjectStore(listener, "127.0.0.1", folder, "secret")
        yield store.environment
        store.close()


@pytest.fixture(scope="module")
def s3(environment: dict[str, str]) -> Iterator[Any]:
    with contextlib.closing(s3_client(environment)) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def _objects(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="plain", Body=CONTENT)
    s3.put_object(Bucket=BUCKET, Key="empty", Body=b"")
    s3.put_object(
        Bucket=BUCKET,
        Key="rich/a & <b>/=ü",
        Body=CONTENT,
        ContentType="text/x",
        ContentEncoding="x",
        CacheControl="no-store",
        Metadata={"of": "mine", "with_underscore": "1"},
        Tagging="a=b",
        StorageClass="STANDARD_IA",
        ServerSideEncryption="AES256",
    )
    parts = {"Bucket": BUCKET, "Key": "rich/parts"}
    upload = {**parts, "UploadId": s3.create_multipart_upload(**parts)["UploadId"]}
    part = s3.upload_part(**upload, PartNumber=1, Body=CONTENT)
    s3.complete_multipart_upload(
        **upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    )


def answers(
    environment: dict[str, str], method: str, path: str, headers: dict[str, str]
) -> tuple[Answer, Answer, bool]:
    """Return the emulator's response, moto's, and whether the emulator answered without moto."""
    given: list[object] = []
    with contextlib.closing(connect(environment)) as connection, pytest.MonkeyPatch.context() as m:

        def ask() -> Answer:
            answer = call(connection, method, path, signed(environment, method, path, headers))
            kept = {k: v for k, v in answer.headers.items() if k not in TIMES_AND_IDS}
            return answer._replace(headers=kept)

        for name in ("reading", "listing"):
            plain = getattr(plain_reads, name)
            m.setattr(
                plain_reads, name, lambda *a, plain=plain: given.append(plain(*a)) or given[-1]
            )
        own = ask()
        for name in ("reading", "listing"):
            m.setattr(plain_reads, name, lambda *_: None)
        return own, ask(), given[-1] is not None


@pytest.mark.parametrize("key", ["plain", "empty", "rich/a & <b>/=ü", "rich/parts"])
@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", {}),
        ("HEAD", {}),
        ("GET", {"range": "bytes=0-9"}),
        ("GET", {"range": "bytes=90-"}),
        ("GET", {"range": "bytes=-5"}),
        ("GET", {"range": "bytes=-200"}),
        ("GET", {"range": "bytes=95-200"}),
    ],
)
def test_plain_read_is_answered_like_moto(
    environment: dict[str, str], method: str, headers: dict[str, str], key: str
) -> None:
    own, motos, is_plain = answers(environment, method, f"/{BUCKET}/{quote(key)}", headers)
    assert own == motos
    assert is_plain == (key != "empty" or not headers)


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "missing", {}),
        ("HEAD", "missing", {}),
        ("GET", "plain?acl=", {}),
        ("GET", "plain?response-content-type=text%2Fx", {}),
        ("GET", "plain", {"range": "bytes=100-200"}),
        ("GET", "plain", {"range": "bytes=5-1"}),
        ("GET", "plain", {"range": "bytes=0-1,3-4"}),
        ("GET", "plain", {"if-match": '"other"'}),
        ("GET", "plain", {"if-none-match": "*"}),
        ("HEAD", "plain", {"range": "bytes=0-9"}),
    ],
)
def test_conditional_read_is_left_to_moto(
    environment: dict[str, str], method: str, path: str, headers: dict[str, str]
) -> None:
    own, motos, is_plain = answers(environment, method, f"/{BUCKET}/{path}", headers)
    assert own.status == motos.status
    assert not is_plain


@pytest.mark.parametrize("prefix", ["", "rich/", "rich/a & <b>/=ü", "nothing/"])
def test_listing_equals_that_of_moto(environment: dict[str, str], prefix: str) -> None:
    path = f"/{BUCKET}?list-type=2&prefix={quote(prefix, safe='')}"
    own, motos, is_plain = answers(environment, "GET", path, {})
    assert is_plain
    assert own.headers["content-type"] == motos.headers["content-type"]
    assert ET.canonicalize(own.body) == ET.canonicalize(motos.body)


def test_object_of_several_versions_is_read_by_moto(environment: dict[str, str], s3: Any) -> None:
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    s3.put_object(Bucket=BUCKET, Key="versions", Body=b"first")
    s3.put_object(Bucket=BUCKET, Key="versions", Body=b"second")
    own, motos, is_plain = answers(environment, "GET", f"/{BUCKET}/versions", {})
    assert own == motos
    assert own.body == b"second"
    assert not is_plain
