"""Check of sink targets: a sink must write to an object store, so that its rows are not lost.

A worker of Polars Cloud also has a local disk. A query that writes there succeeds, but its rows are
lost when the cluster stops.
"""

import re
from typing import Any

from polars_cloud_emulator.model.errors import InvalidRequest

TEMPORARY = "<in-memory>"
"""Target of a result without a destination."""

S3 = {"s3", "s3a"}
S3_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
OTHERS = {
    "gs": "GOOGLE_",
    "gcs": "GOOGLE_",
    "az": "AZURE_",
    "azure": "AZURE_",
    "adl": "AZURE_",
    "abfs": "AZURE_",
    "abfss": "AZURE_",
}
"""Prefix of the variables with the credentials of other object stores, by scheme."""
PATTERN = re.compile(r"[*?\[]")
"""Characters that make a scan treat a path as a pattern."""

Node = dict[str, Any]


def uri_of(payload: Node) -> str | None:
    """Return the target of a sink to files, as the user wrote it; None for other sinks."""
    match payload:
        case {"File": {"target": {"inner": str(uri)}}}:
            return uri
        case {"Partitioned": {"base_path": {"inner": str(uri)}}}:
            return uri
    return None


def check_uri(uri: str) -> None:
    """Check that a sink's target is a folder or object of a bucket.

    Raises
    ------
    InvalidRequest
        The target is something else.
    """
    scheme, separator, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if not separator or scheme == "file":
        reason = "a local path is on the disk of a worker, which is lost when the cluster stops"
    elif scheme not in S3 | OTHERS.keys():
        reason = f"Polars writes to s3://, gs:// and az://, not to {scheme}://"
    elif scheme in S3 and not S3_BUCKET.fullmatch(bucket):
        reason = f"'{bucket}' is not a bucket name of S3 (3 to 63 of a-z, 0-9, '.' and '-')"
    elif {"", ".", ".."} & {*key.removesuffix("/").split("/")}:
        reason = "the path in the bucket is empty, or has a part that is empty, '.' or '..'"
    elif PATTERN.search(key):
        reason = "a scan would treat *, ? and [ as a pattern, and read other files"
    else:
        return
    raise InvalidRequest(
        f"cannot write to '{uri}': {reason}. Use a target like s3://bucket/folder/"
    )
