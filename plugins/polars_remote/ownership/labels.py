"""Labels that lead from a query on Polars Cloud back to the task that submitted it."""

import hashlib

from airflow.sdk import get_current_context

LONGEST = 32
"""Bytes that Polars Cloud allows for a label."""


def get_labels() -> list[str]:
    """Return labels for DAG, task, run and try of the current task, and its map index if mapped.

    Each is a key and a value, such as `dag=multi_stage`, of at most 32 bytes.
    """
    ti = get_current_context()["ti"]
    labels = {"dag": ti.dag_id, "task": ti.task_id, "run": ti.run_id, "try": ti.try_number}
    if ti.map_index is not None and ti.map_index >= 0:
        labels["map"] = ti.map_index
    return [shorten(f"{key}={value}") for key, value in labels.items()]


def shorten(label: str) -> str:
    """Cut a label that is too long, and append a digest to keep it unique."""
    text = label.encode()
    if len(text) <= LONGEST:
        return label
    digest = "~" + hashlib.sha256(text).hexdigest()[:6]
    return text[: LONGEST - len(digest)].decode(errors="ignore") + digest
