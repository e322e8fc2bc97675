"""Advice for known errors of queries."""

from __future__ import annotations

import re
from collections.abc import Collection

BUCKET = re.compile(r"\b(?!https?:)[a-z][a-z0-9+.-]*://[^/\s'\"]+(?=/)")
"""Pattern of a bucket URI in an error. http and https addresses belong to the storage service."""

MISSING_MODULE = re.compile(r"No module named '([^']+)'")


def add_advice(error: Exception, upstream: Collection[str] = ()) -> None:
    """Add a note with advice to the error, if the error is known.

    Parameters
    ----------
    upstream
        Ids of the tasks whose temporary results the query may have read.
    """
    advice = _find_advice(error, upstream)
    if advice and advice not in getattr(error, "__notes__", ()):
        error.add_note(advice)


def _find_advice(error: Exception, upstream: Collection[str]) -> str | None:
    text = str(error)
    if found := BUCKET.search(text):
        bucket = found[0]
        if "NoSuchBucket" in text:
            return f"The bucket {bucket} does not exist: correct the URI, or create the bucket"
        if "redirect" in text:
            return (
                f"The bucket {bucket} is not in the cluster's region: use a bucket in "
                "the region of the workspace, or give scans and sinks "
                'storage_options={"aws_region": ...}'
            )
        if isinstance(error, PermissionError):
            return (
                f"The cluster may not use {bucket}: give the workspace's role "
                "(polars-<workspace>-IAMWorkerRole-...) the right to read, write and list there, "
                "or correct the URI"
            )
    # If the import had failed on this worker, the error would have a `name`.
    if isinstance(error, ModuleNotFoundError) and error.name is None:
        found = MISSING_MODULE.search(text)
        module = f"the module {found[1]}" if found else "one of its modules"
        return (
            f"A function of the query imports {module}, which is not installed on the cluster: "
            "define what the function needs inside the task, or add the package to the cluster's "
            "requirements"
        )
    if "data type mismatch for column" in text:
        return (
            "A column of a scanned file has another type (incoming) than in the first file or in "
            "the schema (target): to find the file, run the DAG preflight with the parameter spend"
        )
    if "expanded paths were empty" in text:
        return "No file exists at the URI of a scan: correct the URI, or write the files first"
    if isinstance(error, FileNotFoundError) and upstream:
        return (
            "If this file was the temporary result of another task, it has expired: "
            f"clear {' or '.join(upstream)}; this task then runs again, too"
        )
    return None
