"""Run remote Polars queries from Airflow tasks, and leave no query or cluster behind.

All imports in this folder are relative, so it can be renamed or moved.
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
