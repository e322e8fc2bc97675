"""Python processes that see nothing of whoever starts them but this package.

A caller's own path may hold a script with a standard module's name, which every process would
import and run; and a worker of Polars Cloud has nothing of its client's machine either.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SEARCH_PATH = Path(__file__).resolve().parents[2]
BOOTSTRAP = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
SHARED = ("LANG", "LC_ALL", "PATH", "TZ")
"""Variables that a worker shares with this machine."""
QUIET = {"POLARS_DISABLE_HTTP_RATE_LIMIT": "1"}
"""Once a process has read from S3, Polars 2.0's limit of requests wakes it every millisecond."""


def python(module: str, *arguments: object) -> list[str]:
    """The command that runs a module of this package."""
    return [sys.executable, "-P", "-c", BOOTSTRAP, str(SEARCH_PATH), module, *map(str, arguments)]


def without_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables, without those that tell Python what to import."""
    return {
        name: value
        for name, value in environment.items()
        if name not in {"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"}
    }


def worker_environment() -> dict[str, str]:
    """Variables of a worker, beside those of its object store and of its cluster."""
    shared = {
        name: value
        for name, value in os.environ.items()
        if name in SHARED or name.lower().endswith("_proxy")
    }
    return shared | QUIET
