"""Where sinks write: to an object store, where the rows outlive the cluster. All else is refused.

A worker of Polars Cloud has a disk, too: a query that wrote there would succeed, and its rows would
be lost with the cluster.
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
"""Object stores beside S3, by scheme: the prefix of the variables with their credentials."""
PATTERN = re.compile(r"[*?\[]")
"""What a scan takes for a pattern."""

Node = dict[str, Any]


def uri_of(payload: Node) -> str | None:
    """The target of a sink to files, as its author wrote it."""
    match payload:
        case {"File": {"target": {"inner": str(uri)}}}:
            return uri
        case {"Partitioned": {"base_path": {"inner": str(uri)}}}:
            return uri
    return None


def check_uri(uri: str) -> None:
    """Refuse what is no folder or object of a bucket.

    Raises
    ------
    InvalidRequest
        With what is wrong, and what to write.
    """
    scheme, separator, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if not separator or scheme == "file":
        reason = "it is on the disk of a worker, which is lost with its cluster"
    elif scheme not in S3 | OTHERS.keys():
        reason = f"Polars writes to s3://, gs:// and az://, not to {scheme}://"
    elif scheme in S3 and not S3_BUCKET.fullmatch(bucket):
        reason = f"S3 has no bucket '{bucket}': a name has 3 to 63 of a-z, 0-9, '.' and '-'"
    elif {"", ".", ".."} & {*key.removesuffix("/").split("/")}:
        reason = "below the bucket it has no name, or one with a part that is empty, '.' or '..'"
    elif PATTERN.search(key):
        reason = "a scan of it would take *, ? and [ for a pattern, and read other files"
    else:
        return
    raise InvalidRequest(f"cannot write to '{uri}': {reason}. Use one like s3://bucket/folder/")
