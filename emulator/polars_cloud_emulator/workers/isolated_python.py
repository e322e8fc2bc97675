"""Python processes that import nothing from their caller's search path but this package.

The caller's search path may contain a script with the name of a standard module, which every
process would import and run. A worker of Polars Cloud has no access to its client's machine either.
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
"""Variables that a worker inherits, besides those of a proxy."""
QUIET = {"POLARS_DISABLE_HTTP_RATE_LIMIT": "1"}
"""Without this, the rate limiter of Polars 2.0 wakes a process that has read from S3 each 1 ms."""


def python(module: str, *arguments: object) -> list[str]:
    """Return the command that runs a module of this package."""
    return [sys.executable, "-P", "-c", BOOTSTRAP, str(SEARCH_PATH), module, *map(str, arguments)]


def without_path(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without those that change what Python imports."""
    return {
        name: value
        for name, value in environment.items()
        if name not in {"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"}
    }


def worker_environment() -> dict[str, str]:
    """Return a worker's variables, besides those of its object store and its cluster."""
    shared = {
        name: value
        for name, value in os.environ.items()
        if name in SHARED or name.lower().endswith("_proxy")
    }
    return shared | QUIET
