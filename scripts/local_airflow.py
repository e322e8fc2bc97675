"""The environment in which this repository's DAGs run without Docker."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
UPKEEP = {"end_orphans", "preflight"}
"""Ids of the DAGs that show no pattern: they look after the deployment."""
PATTERNS = sorted({path.stem for path in (ROOT / "dags").glob("*.py")} - UPKEEP)
"""Ids of the DAGs that show a pattern each."""
FOREIGN = ("AIRFLOW_", "AWS_", "POLARS_")
"""Variables that could point the DAGs at another Airflow, store or account."""
ACCOUNT = ("POLARS_CLOUD_CLIENT_ID", "POLARS_CLOUD_CLIENT_SECRET")
"""With these the client logs in by itself; the DAGs are to do it through the Connection."""
WIDTH = 160
"""Columns where the output is no terminal: room for every URI."""


def use_airflow(home: Path) -> None:
    """Make this process, and those that it starts, use an Airflow of this repository's.

    Must come before the first import of `airflow`, which reads the variables then. Forgets every
    variable that could point the DAGs elsewhere.

    Parameters
    ----------
    home
        AIRFLOW_HOME: where the metadata database and the logs are.
    """
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ |= {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / folder) for folder in (".", "emulator", "plugins")]
        ),
    }


def use_emulator(environment: Mapping[str, str]) -> None:
    """Make the DAGs run here, and in processes started from here, talk to an emulator.

    Must come before the first import of `polars_cloud`, which reads the variables then.

    Parameters
    ----------
    environment
        Every variable that the emulator names.
    """
    os.environ |= {name: value for name, value in environment.items() if name not in ACCOUNT}


@contextlib.contextmanager
def airflow_output_in(log: Path) -> Iterator[Console]:
    """Send what Airflow prints to a file, and give a console for the rest."""
    console = Console(file=os.fdopen(os.dup(sys.stdout.fileno()), "w"), highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        yield console
