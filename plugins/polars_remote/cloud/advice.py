"""Advice on a query's errors."""

from __future__ import annotations

import re
from collections.abc import Collection

BUCKET = re.compile(r"\b(?!https?:)[a-z][a-z0-9+.-]*://[^/\s'\"]+(?=/)")
"""Bucket URI in an error. An http or https address is the storage service's own."""

MISSING_MODULE = re.compile(r"No module named '([^']+)'")


def add_advice(error: Exception, upstream: Collection[str] = ()) -> None:
    """Add a note with advice, if the error is known.

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
            return f"The bucket {bucket} does not exist: correct the URI, or create it"
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
    # An import that fails here gives the module's name to the error.
    if isinstance(error, ModuleNotFoundError) and error.name is None:
        found = MISSING_MODULE.search(text)
        module = f"the module {found[1]}" if found else "one of its modules"
        return (
            f"A function of the query needs {module}, which the cluster does not have: define what "
            "it needs inside the task, or name a package that has it in the cluster's requirements"
        )
    if "data type mismatch for column" in text:
        return (
            "A scanned file has another type (incoming) than the first file or the schema "
            "(target): the DAG preflight, with the parameter spend, names the file"
        )
    if "expanded paths were empty" in text:
        return "There is no file at the URI of a scan: correct the URI, or write the files first"
    if isinstance(error, FileNotFoundError) and upstream:
        return (
            "If this was the temporary result of another task, it has expired: "
            f"clear {' or '.join(upstream)}, which runs this task again as well"
        )
    return None
