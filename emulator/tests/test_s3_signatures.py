"""Amazon's examples of signatures of S3 requests.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html
"""

import io
from datetime import UTC, datetime

import pytest
from werkzeug.wrappers import Request

from polars_cloud_emulator.storage.s3_bodies import Body, read_body
from polars_cloud_emulator.storage.s3_errors import S3Error
from polars_cloud_emulator.storage.s3_signatures import SignatureCheck

CHECK = SignatureCheck("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
DATE = "20130524T000000Z"
NOW = datetime(2013, 5, 24, tzinfo=UTC)
CREDENTIAL = "AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request"
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
STREAMED = {
    "host": "s3.amazonaws.com",
    "x-amz-date": DATE,
    "x-amz-storage-class": "REDUCED_REDUNDANCY",
    "content-encoding": "aws-chunked",
    "x-amz-decoded-content-length": "66560",
}
CHUNKED = {
    **STREAMED,
    "x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
    "content-length": "66824",
    "authorization": f"AWS4-HMAC-SHA256 Credential={CREDENTIAL},SignedHeaders=content-encoding;"
    "content-length;host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length;"
    "x-amz-storage-class,"
    "Signature=4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9",
}
CHUNKS = (
    b"10000;chunk-signature=ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648\r\n"
    + b"a" * 65536
    + b"\r\n400;chunk-signature="
    b"0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497\r\n"
    + b"a"
    * 1024
    + b"\r\n0;chunk-signature=b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9\r\n"
    b"\r\n"
)
WITH_TRAILER = {
    **STREAMED,
    "x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER",
    "x-amz-trailer": "x-amz-checksum-crc32c",
    "authorization": f"AWS4-HMAC-SHA256 Credential={CREDENTIAL},SignedHeaders=content-encoding;"
    "host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length;x-amz-storage-class;"
    "x-amz-trailer,"
    "Signature=106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e",
}
CHUNKS_WITH_TRAILER = (
    b"10000;chunk-signature=b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2\r\n"
    + b"a" * 65536
    + b"\r\n400;chunk-signature="
    b"1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7\r\n"
    + b"a"
    * 1024
    + b"\r\n0;chunk-signature=2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992\r\n"
    b"x-amz-checksum-crc32c:sOO8/Q==\r\n"
    b"x-amz-trailer-signature:d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435\r\n"
    b"\r\n"
)
PRESIGNED = (
    "/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256"
    f"&X-Amz-Credential={CREDENTIAL.replace('/', '%2F')}&X-Amz-Date={DATE}&X-Amz-Expires=86400"
    "&X-Amz-SignedHeaders=host"
    "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
)


def request(method: str, target: str, headers: dict[str, str], body: bytes = b"") -> Request:
    environ = {
        "REQUEST_METHOD": method,
        "RAW_URI": target,
        "QUERY_STRING": target.partition("?")[2],
        "wsgi.input": io.BytesIO(body),
    }
    for name, value in headers.items():
        key = name.upper().replace("-", "_")
        environ[key if key == "CONTENT_LENGTH" else f"HTTP_{key}"] = value
    return Request(environ)


@pytest.mark.parametrize(
    ("target", "headers", "signature"),
    [
        (
            "/test.txt",
            {"range": "bytes=0-9"},
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        ("/?lifecycle", {}, "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        (
            "/?max-keys=2&prefix=J",
            {},
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)
def test_signature_in_the_header_is_the_one_of_the_example(
    target: str, headers: dict[str, str], signature: str
) -> None:
    host = "examplebucket.s3.amazonaws.com"
    headers = {"host": host, "x-amz-content-sha256": EMPTY, "x-amz-date": DATE, **headers}
    names = ";".join(sorted(headers))
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={CREDENTIAL},SignedHeaders={names},Signature={signature}"
    )
    found = CHECK(request("GET", target, headers), NOW)
    assert (found.region, found.payload) == ("us-east-1", EMPTY)


def test_signature_in_the_query_is_the_one_of_the_example() -> None:
    found = CHECK(request("GET", PRESIGNED, {"host": "examplebucket.s3.amazonaws.com"}), NOW)
    assert (found.region, found.payload) == ("us-east-1", "UNSIGNED-PAYLOAD")


def read(headers: dict[str, str], body: bytes) -> Body:
    sent = request("PUT", "/examplebucket/chunkObject.txt", headers, body)
    return read_body(sent, CHECK(sent, NOW))


def test_signatures_of_chunks_are_those_of_the_example() -> None:
    assert read(CHUNKED, CHUNKS) == Body(b"a" * 66560, {})
    checksums = {"x-amz-checksum-crc32c": "sOO8/Q=="}
    assert read(WITH_TRAILER, CHUNKS_WITH_TRAILER) == Body(b"a" * 66560, checksums)


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (b"aaa\r\n400", b"aab\r\n400", "SignatureDoesNotMatch"),
        (b"aaa\r\n0", b"aab\r\n0", "SignatureDoesNotMatch"),
        (b"0;chunk-signature=2c", b"0;chunk-signature=2d", "SignatureDoesNotMatch"),
        (b"400;chunk-signature=", b"400\r\n", "SignatureDoesNotMatch"),
        (b"400;chunk", b"3ff;chunk", "SignatureDoesNotMatch"),
        (b"10000;chunk", b"fffff;chunk", "IncompleteBody"),
        (b"10000;chunk", b"one;chunk", "InvalidRequest"),
        (b"sOO8", b"sOO9", "SignatureDoesNotMatch"),
        (b"x-amz-trailer-signature", b"x-amz-other", "SignatureDoesNotMatch"),
    ],
)
def test_chunk_that_was_not_signed_is_refused(before: bytes, after: bytes, code: str) -> None:
    changed = CHUNKS_WITH_TRAILER.replace(before, after)
    assert changed != CHUNKS_WITH_TRAILER
    with pytest.raises(S3Error) as refused:
        read(WITH_TRAILER, changed)
    assert refused.value.code == code


def test_body_that_ends_early_is_refused() -> None:
    for end in (0, 1, 100, 66_000, len(CHUNKS) - 100):
        with pytest.raises(S3Error) as refused:
            read(CHUNKED, CHUNKS[:end])
        assert refused.value.code in {"IncompleteBody", "InvalidRequest", "SignatureDoesNotMatch"}


def test_only_checksums_come_behind_a_body() -> None:
    chunks = b"1\r\na\r\n0\r\nx-amz-acl:public-read\r\n\r\n"
    headers = {"x-amz-decoded-content-length": "1"}
    found = CHECK(request("GET", PRESIGNED, {"host": "examplebucket.s3.amazonaws.com"}), NOW)
    found = found._replace(payload="STREAMING-UNSIGNED-PAYLOAD-TRAILER")
    with pytest.raises(S3Error, match="x-amz-acl is not allowed"):
        read_body(request("PUT", "/x", headers, chunks), found)
