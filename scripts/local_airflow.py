"""The environment in which this repository's DAGs run without Docker."""

import contextlib
import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
UPKEEP = {"end_orphans", "preflight"}
"""Ids of the DAGs that maintain the deployment instead of showing a pattern."""
PATTERNS = sorted({path.stem for path in (ROOT / "dags").glob("*.py")} - UPKEEP)
"""Ids of the DAGs that show one pattern each."""
FOREIGN = ("AIRFLOW_", "AWS_", "POLARS_")
"""Prefixes of variables that could point the DAGs at another Airflow, store or account."""
ACCOUNT = ("POLARS_CLOUD_CLIENT_ID", "POLARS_CLOUD_CLIENT_SECRET")
"""Variables with which the client would log in by itself, without the Connection."""
WIDTH = 160
"""Width in characters of output that is not a terminal. No URI is wrapped at this width."""


def find_dag_file(dag_id: str) -> Path:
    """Return the file of one of this repository's DAGs.

    Raises
    ------
    SystemExit
        There is no such DAG. The message lists the existing ones.
    """
    files = {file.stem: file for file in sorted((ROOT / "dags").glob("*.py"))}
    if dag_id not in files:
        like = difflib.get_close_matches(Path(dag_id).stem, files, n=1)
        meant = f" Did you mean {like[0]}?" if like else ""
        sys.exit(f"There is no DAG {dag_id!r} in dags/.{meant} The DAGs are {', '.join(files)}")
    return files[dag_id]


def get_function(task: Any) -> FunctionType | None:
    """Return the function that a task calls, or None: an operator may call any object, or none."""
    function = getattr(task, "python_callable", None)
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return function if inspect.isfunction(function) else None


def shorten(trace: str) -> str:
    """Return a DAG file's traceback without the entries outside `dags/` and `include/`."""
    entries = re.compile(r'  File "([^"]+)".*\n(?:    .*\n)*')
    own = tuple(f"{ROOT / folder}/" for folder in ("dags", "include"))
    return entries.sub(
        lambda entry: entry[0].replace(f"{ROOT}/", "") if entry[1].startswith(own) else "",
        trace.rstrip(),
    )


def use_airflow(home: Path) -> None:
    """Make this process and its children use an Airflow with this repository's DAGs.

    Call it before the first import of `airflow`, which reads the variables. It deletes every
    variable that could point the DAGs elsewhere.

    Parameters
    ----------
    home
        AIRFLOW_HOME, the folder of the metadata database and the logs.
    """
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ |= {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGBAG_IMPORT_ERROR_TRACEBACK_DEPTH": "50",
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / folder) for folder in (".", "emulator", "plugins")]
        ),
    }


def use_emulator(environment: Mapping[str, str]) -> None:
    """Make the DAGs in this process and its children talk to an emulator.

    Call it before the first import of `polars_cloud`, which reads the variables.

    Parameters
    ----------
    environment
        Variables from the emulator.
    """
    os.environ |= {name: value for name, value in environment.items() if name not in ACCOUNT}


@contextlib.contextmanager
def airflow_output_in(log: Path) -> Iterator[Console]:
    """Redirect standard output and errors to a file; yield a console on the former output."""
    console = Console(file=os.fdopen(os.dup(sys.stdout.fileno()), "w"), highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        try:
            yield console
        except Exception as error:
            console.print(f"{type(error).__name__}: {error}\nSee {log}", style="red", markup=False)
            raise
