"""Print what the components of a deployment find, each started as Airflow starts it.

Run as a script in the deployment's environment. The arguments are pairs of a bundle and a DAG to
run. The last line of the output is JSON.
"""

import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

from airflow.cli.cli_parser import get_parser
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.models import DagModel
from airflow.models.errors import ParseImportError
from airflow.settings import PLUGINS_FOLDER
from airflow.utils.session import create_session
from sqlalchemy import select


def run_command(*arguments: str) -> None:
    parsed = get_parser().parse_args(arguments)
    parsed.func(parsed)


def process_dag_files() -> dict[str, Any]:
    """Let the DAG processor parse every file once; return what the UI then shows."""
    run_command("dag-processor", "--num-runs=1")
    with create_session() as session:
        dags = session.execute(select(DagModel.bundle_name, DagModel.dag_id)).all()
        errors = session.execute(select(ParseImportError.filename, ParseImportError.stacktrace))
        return {"dags": sorted(map(list, dags)), "errors": dict(map(tuple, errors))}


def load_plugins() -> list[str]:
    """Load the plugins; return the modules that this imported."""
    run_command("plugins")
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return sorted(file for file in files if file and file.startswith(PLUGINS_FOLDER))


def import_triggers() -> str:
    """Import the triggers without a bundle on the path, as a triggerer does; return their file."""
    sys.path[:0] = filter(None, os.environ["TRIGGERER_PYTHONPATH"].split(os.pathsep))
    try:
        return str(importlib.import_module("polars_remote.waiting.triggers").__file__)
    except ModuleNotFoundError as error:
        return str(error)


def run_dags(*bundles_and_dags: str) -> dict[str, str]:
    """Run DAGs that are loaded as by a worker; return the states of the runs, by bundle."""
    states = {}
    for bundle, dag_id in zip(bundles_and_dags[::2], bundles_and_dags[1::2], strict=True):
        path = DagBundlesManager().get_bundle(bundle).path
        dag = BundleDagBag(path, bundle_path=path, bundle_name=bundle).dags[dag_id]
        states[bundle] = str(dag.test().state.value)
        # Fork, so that each bundle imports its own modules without a slow start of Airflow.
        sys.path.remove(str(path))
        for module in [
            name for name in sys.modules if name.split(".")[0] in {"include", "polars_remote"}
        ]:
            del sys.modules[module]
    return states


def in_fork(function: Callable[..., Any], *arguments: str) -> Any:
    """Call a function in a forked process, in which only Airflow has been imported."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    report = {
        "plugins": in_fork(load_plugins),
        "triggers": in_fork(import_triggers),
        **process_dag_files(),
        "runs": in_fork(run_dags, *sys.argv[1:]),
    }
    print(json.dumps(report))
