"""Labels of a query on Polars Cloud, which name the task that submitted the query."""

import hashlib
from contextlib import suppress
from importlib import import_module
from typing import Any
from uuid import UUID

from airflow.sdk import get_current_context

MAX_LABEL_BYTES = 32
"""Maximum length of a label on Polars Cloud, in bytes."""

DIGEST_LENGTH = 7
"""Bytes of `~` and the digest at the end of a label that was cut."""


def get_labels() -> list[str]:
    """Return labels for DAG, task, run and try of the current task, and its map index if mapped.

    Each label is a text such as `dag=multi_stage`, of at most 32 bytes. A longer run id continues
    in the labels `run2`, `run3` and so on.
    """
    ti = get_current_context()["ti"]
    labels = {"dag": ti.dag_id, "task": ti.task_id, "run": ti.run_id, "try": ti.try_number}
    if ti.map_index is not None and ti.map_index >= 0:
        labels["map"] = ti.map_index
    short = [shorten(f"{key}={value}") for key, value in labels.items()]
    return short + _continue_run(ti.run_id)


def get_lineage() -> dict[str, Any]:
    """Return the fields of a query's lineage: the query's job, and the task's run as its parent.

    With Airflow's OpenLineage provider, names and id are the same as in the provider's events.
    """
    ti = get_current_context()["ti"]
    namespace, job, run_id = "default", f"{ti.dag_id}.{ti.task_id}", str(ti.id)
    # An error in the provider must not prevent the query.
    with suppress(Exception):
        macros = import_module("airflow.providers.openlineage.plugins.macros")
        namespace, job = macros.lineage_job_namespace(), macros.lineage_job_name(ti)
        run_id = macros.lineage_run_id(ti)
    return {
        "job_namespace": namespace,
        "job_name": f"{job}.query",
        "parent_run_id": UUID(run_id),
        "parent_job_namespace": namespace,
        "parent_job_name": job,
    }


def _continue_run(run_id: str) -> list[str]:
    """Return labels with the part of the run's id that its shortened label lacks."""
    label = shorten(f"run={run_id}")
    # A label must not begin or end with whitespace, and letters beyond ASCII have several bytes.
    if label == f"run={run_id}" or not run_id.isascii() or any(map(str.isspace, run_id)):
        return []
    shown = len(label) - len("run=") - DIGEST_LENGTH
    size = MAX_LABEL_BYTES - len("run99=")
    parts = [run_id[start : start + size] for start in range(shown, len(run_id), size)]
    return [f"run{number}={part}" for number, part in enumerate(parts, 2)]


def shorten(label: str) -> str:
    """Return the label; if it is too long, cut it and append a digest to keep it unique."""
    text = label.encode()
    if len(text) <= MAX_LABEL_BYTES:
        return label
    digest = ("~" + hashlib.sha256(text).hexdigest())[:DIGEST_LENGTH]
    return text[: MAX_LABEL_BYTES - DIGEST_LENGTH].decode(errors="ignore") + digest
