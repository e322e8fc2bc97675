"""The page *Polars Cloud* in Airflow's UI.

Every task process imports plugins, so this module imports nothing of the page.
"""

from collections.abc import Callable
from typing import Any

from airflow.plugins_manager import AirflowPlugin


async def _serve(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Hand over to the page, which the API server imports at the first request."""
    from .page import app

    await app()(scope, receive, send)


class PolarsCloudPlugin(AirflowPlugin):
    """A page about what is in use, and its place in the menu."""

    name = "polars_cloud"
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
