"""The body of an S3 request, checked against its signature."""

import hashlib
import io
import re
from typing import IO, NamedTuple

from werkzeug.wrappers import Request

from polars_cloud_emulator.storage.s3_errors import S3Error
from polars_cloud_emulator.storage.s3_signatures import (
    NO_HASH,
    SIGNED_CHUNKS_AND_TRAILER,
    STREAMED,
    UNSIGNED_CHUNKS,
    Signed,
)

LARGEST = 5 * 2**30
"""Maximum bytes of an object or of a part that one request can upload."""
PIECE = 2**20
"""Maximum bytes of one read, so that memory is allocated only for data that was sent."""
LONGEST_LINE = 1_000


class Body(NamedTuple):
    content: bytes
    checksums: dict[str, str]
    """Trailing headers."""


def read_body(request: Request, signed: Signed) -> Body:
    """Read the whole body.

    Raises
    ------
    S3Error
        The body is too large, incomplete, or does not match its signature.
    """
    is_streamed = signed.payload in STREAMED
    length = _length(request, is_streamed)
    stream = request.environ["wsgi.input"]
    if is_streamed:
        lines = io.BufferedReader(stream)
        try:
            return _read_chunks(lines, length, signed)
        finally:
            lines.detach()  # else it would close the stream
    content = _read(stream, length)
    if signed.payload not in NO_HASH and hashlib.sha256(content).hexdigest() != signed.payload:
        raise S3Error(
            "XAmzContentSHA256Mismatch",
            "The provided 'x-amz-content-sha256' header does not match what was computed.",
        )
    return Body(content, {})


def _length(request: Request, is_streamed: bool) -> int:
    length = request.content_length
    if is_streamed:
        decoded = request.headers.get("x-amz-decoded-content-length", "")
        length = int(decoded) if re.fullmatch("[0-9]{1,15}", decoded) else None
    elif "transfer-encoding" in request.headers:
        raise S3Error("NotImplemented", "The header Transfer-Encoding is not supported.")
    if length is None and request.method != "PUT":
        length = 0
    if length is None:
        raise S3Error("MissingContentLength", "You must provide the Content-Length HTTP header.")
    if length > LARGEST:
        raise S3Error(
            "EntityTooLarge",
            f"Your proposed upload exceeds the maximum allowed size of {LARGEST} bytes. "
            "Send the object in parts.",
        )
    return length


def _read_chunks(stream: io.BufferedReader, length: int, signed: Signed) -> Body:
    content = bytearray()
    size = -1
    while size:
        header = re.fullmatch(rb"([0-9a-fA-F]{1,8})(?:;chunk-signature=(\w+))?", _line(stream))
        if header is None:
            raise S3Error("InvalidRequest", "A chunk of the body must begin with its size.")
        size = int(header[1], 16)
        if len(content) + size > length:
            raise _cut_short()
        chunk = _read(stream, size)
        if signed.payload != UNSIGNED_CHUNKS:
            signed.chunks.check_chunk(chunk, (header[2] or b"").decode())
        if size and _line(stream):
            raise S3Error("InvalidRequest", "A chunk of the body is longer than its size.")
        content += chunk
    if len(content) != length:
        raise _cut_short()
    return Body(bytes(content), _read_trailer(stream, signed))


def _read_trailer(stream: io.BufferedReader, signed: Signed) -> dict[str, str]:
    headers: dict[str, str] = {}
    while line := _line(stream):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    signature = headers.pop("x-amz-trailer-signature", "")
    if signed.payload == SIGNED_CHUNKS_AND_TRAILER:
        text = "".join(f"{name}:{value}\n" for name, value in headers.items())
        signed.chunks.check_trailer(text.encode(), signature)
    for name in headers:
        # Other trailing headers could not be checked against the signature of the request.
        if not name.startswith("x-amz-checksum-"):
            raise S3Error("InvalidRequest", f"The trailing header {name} is not allowed.")
    return headers


def _line(stream: io.BufferedReader) -> bytes:
    """Return the next line without its line ending; empty at the end of the body."""
    return stream.readline(LONGEST_LINE).rstrip(b"\r\n")


def _read(stream: IO[bytes], length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        piece = stream.read(min(length - len(content), PIECE))
        if not piece:
            raise _cut_short()
        content += piece
    return bytes(content)


def _cut_short() -> S3Error:
    return S3Error(
        "IncompleteBody",
        "You did not provide the number of bytes specified by the Content-Length HTTP header.",
    )
