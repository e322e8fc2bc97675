"""Fast path for plain reads of a bucket on disk, which are most requests of Polars.

moto takes milliseconds for each read, and reads the whole object for each range request. The
responses here equal those of moto. Reads with any further condition are left to moto.
"""

import os
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from moto.s3.models import FakeBucket, FakeKey, S3Backend
from moto.s3.utils import ARCHIVE_STORAGE_CLASSES
from werkzeug.wrappers import Request
from werkzeug.wsgi import FileWrapper

EPOCH = datetime(1970, 1, 1)
"""Epoch of moto's times, which are naive and in UTC."""
PAGE = 1_000
"""Maximum objects of a listing."""


class Answer(NamedTuple):
    status: str
    headers: list[tuple[str, str]]
    content: Iterable[bytes]


def listing(request: Request, backend: S3Backend, bucket: FakeBucket) -> Answer | None:
    """Return a listing of the objects with a prefix; None if moto has to answer."""
    prefix = request.args.get("prefix", "")
    is_plain = request.method == "GET" and request.args.get("list-type") == "2"
    if not is_plain or request.args.keys() - {"list-type", "prefix"} or _has_rules(bucket):
        return None
    found, is_truncated, _ = backend.list_objects_v2(bucket, prefix, None, None, None, PAGE)
    keys = [key for key in found if isinstance(key, FakeKey)]
    if is_truncated or not all(key.name.isprintable() for key in keys):
        return None
    document = (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<IsTruncated>false</IsTruncated>{''.join(map(_entry, keys))}<Name>{bucket.name}</Name>"
        f"<Prefix>{escape(prefix)}</Prefix><MaxKeys>{PAGE}</MaxKeys>"
        f"<KeyCount>{len(keys)}</KeyCount></ListBucketResult>"
    ).encode()
    headers = [("content-type", "application/xml"), ("content-length", str(len(document)))]
    return Answer("200 OK", headers, [document])


def reading(
    request: Request, backend: S3Backend, bucket: FakeBucket, key: str, path: Path
) -> Answer | None:
    """Return an object, a range of it, or its headers; None if moto has to answer."""
    wanted = request.headers.get("range")
    if (
        request.method not in {"GET", "HEAD"}
        or (request.method == "HEAD" and wanted is not None)
        or any(name != "x-id" and not name.startswith("X-Amz-") for name in request.args)
        or any(name.lower().startswith("if-") for name, _ in request.headers)
        or _has_rules(bucket)
    ):
        return None
    found = backend.get_object(bucket.name, key)
    if (
        found is None
        or found.version_id != "null"
        or found.storage_class in ARCHIVE_STORAGE_CLASSES
        # S3 returns a checksum for a whole object only, not for a range.
        or (found.checksum_algorithm and "x-amz-checksum-mode" in request.headers and not wanted)
    ):
        return None
    part = slice(0, found.size) if wanted is None else _part(wanted, found.size)
    if part is None:
        return None
    headers = {**found.response_dict, **found.metadata, "accept-ranges": "bytes"}
    headers.pop("x-amz-content-sha256", None)  # belongs to the request that wrote the object
    headers["content-length"] = str(part.stop - part.start)
    status = "200 OK"
    if wanted is not None:
        status = "206 Partial Content"
        headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{found.size}"
    try:
        file = path.open("rb")
    except FileNotFoundError:  # the object has just been deleted
        return None
    # While an object is being replaced, the file may be that of the new object already.
    if os.fstat(file.fileno()).st_mtime_ns != written_at(found):
        file.close()
        return None
    file.seek(part.start)
    content: Iterable[bytes] = FileWrapper(file)
    if request.method == "HEAD":
        file.close()
        content = []
    return Answer(status, [*headers.items()], content)


def written_at(found: FakeKey) -> int:
    """Return the modification time of an object's file, in nanoseconds."""
    microseconds: int = (found.last_modified - EPOCH) // timedelta(microseconds=1)
    return microseconds * 1000


def _entry(key: FakeKey) -> str:
    """Return the XML of an object in a listing."""
    algorithm = ""
    if key.checksum_algorithm:
        algorithm = f"<ChecksumAlgorithm>{escape(key.checksum_algorithm)}</ChecksumAlgorithm>"
    return (
        f"<Contents><Key>{escape(key.name)}</Key>"
        f"<LastModified>{key.last_modified_ISO8601}</LastModified><ETag>{key.etag}</ETag>"
        f"{algorithm}<Size>{key.size}</Size><StorageClass>{key.storage_class}</StorageClass>"
        "</Contents>"
    )


def _has_rules(bucket: FakeBucket) -> bool:
    """Return whether a policy, CORS or logging affects reads, which only moto can apply."""
    return bool(bucket.policy is not None or bucket.cors or bucket.logging)


def _part(wanted: str, size: int) -> slice | None:
    """Return the byte range of a ``Range`` header; None if it is not one satisfiable range."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", wanted)
    if match is None:
        return None
    first, last = match.groups()
    if first:
        part = slice(int(first), min(int(last) + 1, size) if last else size)
    else:
        part = slice(max(size - int(last or 0), 0), size)
    return part if part.start < part.stop else None
