"""Print what Airflow finds in the installed wheel; the last line of the output is JSON.

Run as a script in an environment with an AIRFLOW_HOME whose DAGs folder holds `manifest_reuse`.
"""

import json
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
        "links": [name for name in manager.extra_links_class_names if "polars" in name],
        "heavy": sorted(HEAVY & set(sys.modules)),
    }


def run_dag() -> str:
    """Run a DAG that uses the decorator under the name that Airflow registers."""
    if __version__.startswith("3.1."):
        from airflow.models.dagbag import DagBag
    else:
        from airflow.dag_processing.dagbag import DagBag

    bag = DagBag()
    assert bag.import_errors == {}, bag.import_errors
    return str(bag.dags["manifest_reuse"].test().state.value)


if __name__ == "__main__":
    provider = read_provider()
    run_command("db", "migrate")
    print(json.dumps({"airflow": __version__, "provider": provider, "run": run_dag()}))
