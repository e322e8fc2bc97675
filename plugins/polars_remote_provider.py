"""Provider metadata, for Airflow where the library is installed as a distribution.

This module is outside the package, because Airflow calls it while it loads its configuration, which
the package's modules need.
"""

from importlib.metadata import version
from typing import Any

DISTRIBUTION = "airflow-polars-remote"


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, for Airflow's entry point `apache_airflow_provider`."""
    return {
        "package-name": DISTRIBUTION,
        "name": "Polars Cloud",
        "description": "Remote Polars queries on Polars Cloud, from Airflow tasks.",
        "versions": [version(DISTRIBUTION)],
        "connection-types": [
            {
                "connection-type": "polars_cloud",
                "hook-class-name": "polars_remote.connection.PolarsCloudHook",
                "hook-name": "Polars Cloud",
                "ui-field-behaviour": {
                    "hidden-fields": ["host", "port", "schema"],
                    "relabeling": {"login": "Client ID", "password": "Client secret"},
                },
            }
        ],
        "extra-links": ["polars_remote.links.QueryLink"],
        "task-decorators": [
            {"name": "polars_query", "class-name": "polars_remote.query_tasks.query_task"}
        ],
    }
