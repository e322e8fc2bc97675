"""Run remote Polars queries from Airflow tasks, without orphaned queries or clusters.

All imports in this folder are relative, so that the folder can be renamed or moved. Names are
imported when they are first used, so that Airflow's API server imports only `links`, `connection`,
`plugin` and `page`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clusters import ensure_manifest, shared_cluster, use_cluster
    from .ownership.end import clean_up
    from .queries import Query, detach
    from .query_tasks import query_task

__version__ = "1.0.0"

__all__ = [
    "Query",
    "clean_up",
    "detach",
    "ensure_manifest",
    "query_task",
    "shared_cluster",
    "use_cluster",
]

_MODULES = {
    "Query": ".queries",
    "clean_up": ".ownership.end",
    "detach": ".queries",
    "ensure_manifest": ".clusters",
    "query_task": ".query_tasks",
    "shared_cluster": ".clusters",
    "use_cluster": ".clusters",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


# Without it, a misspelled import is not answered with "Did you mean".
def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
