"""Say what is wrong with the place where the DAGs' data lies, before a cluster costs anything."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .airflow_versions import AirflowFailException
from .login import talks_to_emulator
from .settings import DATA

if TYPE_CHECKING:
    from airflow.sdk import DAG

PLACEHOLDER = "s3://your-bucket"
"""The default: a bucket of the emulator's."""


def check_data_location() -> None:
    """Refuse a data location that no cluster could use.

    Raises
    ------
    AirflowFailException
        It has no scheme or no bucket, or is the placeholder where Polars Cloud is the real one.
    """
    url = urlsplit(DATA)
    if not url.scheme or not url.netloc:
        problem = f"is '{DATA}', which has no {'bucket' if url.scheme else 'scheme'}"
    elif DATA == PLACEHOLDER and not talks_to_emulator():
        problem = f"is not set, and its default {PLACEHOLDER} is the emulator's"
    else:
        return
    raise AirflowFailException(
        f"POLARS_CLOUD_DATA {problem}. Set it to the URI below which your tables lie, such as "
        "s3://my-bucket/shop"
    )


def uses_data_location(dag: DAG) -> bool:
    """Whether the DAG's file has a constant that begins with the data location.

    Files that know their URIs from elsewhere have none.
    """
    return any(
        isinstance(value, str) and value.startswith(DATA)
        for task in dag.tasks
        if hasattr(task, "python_callable")
        for value in getattr(inspect.unwrap(task.python_callable), "__globals__", {}).values()
    )


def explain(error: Exception) -> str | None:
    """What to do about a query's error if the storage has refused the data location's bucket."""
    url = urlsplit(DATA)
    bucket, text = f"{url.scheme}://{url.netloc}", str(error)
    if f"{bucket}/" not in text:
        return None
    if "NoSuchBucket" in text:
        return f"The bucket {bucket} does not exist: correct POLARS_CLOUD_DATA, or create it"
    if "redirect" in text:
        return (
            f"The bucket {bucket} is in another region than the cluster looks in: use one in the "
            'region of the workspace, or give scans and sinks storage_options={"aws_region": ...}'
        )
    if isinstance(error, PermissionError):
        return (
            f"The cluster may not use {bucket}: give the workspace's role "
            "(polars-<workspace>-IAMWorkerRole-...) the right to read, write and list there, or "
            "correct POLARS_CLOUD_DATA"
        )
    return None
