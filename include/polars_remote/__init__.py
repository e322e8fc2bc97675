"""Run remote Polars queries from Airflow tasks, and end whatever a task has started with the task.

All imports in this folder are relative: it can be renamed, or moved as a whole.
"""

from .clusters import compute_context, shared_cluster, use_cluster
from .leftovers import clean_up
from .manifests import ensure_manifest
from .queries import leave, run_query, submit, wait_for

__all__ = [
    "clean_up",
    "compute_context",
    "ensure_manifest",
    "leave",
    "run_query",
    "shared_cluster",
    "submit",
    "use_cluster",
    "wait_for",
]
