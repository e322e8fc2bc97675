"""Run remote Polars queries from Airflow tasks, and end with the task whatever it has started.

All imports in this folder are relative: it can be renamed, or moved as a whole.
"""

from .clusters import ensure_manifest, shared_cluster, use_cluster
from .ownership.end import clean_up
from .queries import Query, detach
from .query_tasks import query_task

__all__ = [
    "Query",
    "clean_up",
    "detach",
    "ensure_manifest",
    "query_task",
    "shared_cluster",
    "use_cluster",
]
