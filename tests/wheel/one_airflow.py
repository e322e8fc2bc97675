"""What an Airflow makes of the installed wheel; the last line of the output is JSON.

Run as a script in an environment with an AIRFLOW_HOME whose DAGs folder holds `manifest_reuse`.
"""

import json
import os
import sys

from airflow import __version__
from airflow.cli.cli_parser import get_parser
from airflow.providers_manager import ProvidersManager

HEAVY = {"polars", "polars_cloud", "polars_remote.clusters", "polars_remote.query_tasks"}


def run_command(*arguments: str) -> None:
    parsed = get_parser().parse_args(arguments)
    parsed.func(parsed)


def read_provider() -> dict[str, object]:
    """Read what the provider registers, as the API server does."""
    manager = ProvidersManager()
    hook = manager.hooks["polars_cloud"]
    assert hook is not None
    return {
        "name": hook.hook_name,
        "labels": manager.field_behaviours.get("polars_cloud", {}).get("relabeling", {}),
        "links": [name for name in manager.extra_links_class_names if "polars" in name],
        "heavy": sorted(HEAVY & set(sys.modules)),
    }


def run_dag() -> str:
    """Run a DAG that names the decorator as Airflow registers it."""
    if __version__.startswith("3.1."):
        from airflow.models.dagbag import DagBag
    else:
        from airflow.dag_processing.dagbag import DagBag

    bag = DagBag()
    assert bag.import_errors == {}, bag.import_errors
    return str(bag.dags["manifest_reuse"].test().state.value)


def try_connections() -> list[tuple[bool, str]]:
    """Test a Connection as its form does: with the right secret, a wrong one, and none."""
    from polars_remote.connection import PolarsCloudHook

    tries = []
    right = os.environ["POLARS_CLOUD_CLIENT_SECRET"]
    for password in (right, "wrong", None):
        account = {"login": os.environ["POLARS_CLOUD_CLIENT_ID"], "password": password}
        os.environ["AIRFLOW_CONN_TRIED"] = json.dumps({"conn_type": "polars_cloud", **account})
        tries.append(PolarsCloudHook("tried").test_connection())
    return tries


if __name__ == "__main__":
    provider = read_provider()
    run_command("db", "migrate")
    report = {"provider": provider, "tries": try_connections(), "run": run_dag()}
    print(json.dumps({"airflow": __version__, **report}))
