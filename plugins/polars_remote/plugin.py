"""The page *Polars Cloud* and the link *Polars Cloud query* in Airflow's UI.

Every task process imports plugins, so this module imports nothing of the page.
"""

from collections.abc import Callable
from typing import Any

from airflow.plugins_manager import AirflowPlugin

from .links import StoredQueryLink


async def _serve(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Hand over to the page, which the API server imports at the first request."""
    from .page import app

    await app()(scope, receive, send)


class PolarsCloudPlugin(AirflowPlugin):
    """The page of clusters and queries in use, its menu entry, and the link to a task's query."""

    name = "polars_cloud"
    operator_extra_links = [StoredQueryLink()]  # noqa: RUF012
    fastapi_apps = [  # noqa: RUF012
        {"name": "Polars Cloud", "app": _serve, "url_prefix": "/polars-cloud"}
    ]
    # Without `url_route`, which would show the page in a frame whose links Airflow blocks.
    external_views = [  # noqa: RUF012
        {
            "name": "Polars Cloud",
            "href": "polars-cloud/",
            "destination": "nav",
            "category": "browse",
        }
    ]
