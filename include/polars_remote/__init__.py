"""Run remote Polars queries from Airflow tasks, and end whatever a task has started with the task.

All imports in this folder are relative: it can be renamed, or moved as a whole.
"""

from .clusters import compute_context, use_cluster
from .leftovers import clean_up
from .manifests import ensure_manifest
from .queries import Query, leave, run_query, submit, wait_for
from .query_tasks import query_task
from .shared_clusters import shared_cluster

__all__ = [
    "Query",
    "clean_up",
    "compute_context",
    "ensure_manifest",
    "leave",
    "query_task",
    "run_query",
    "shared_cluster",
    "submit",
    "use_cluster",
    "wait_for",
]
