"""What a user's function may import on a worker: Python, Polars, and what its cluster declares."""

import re
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The latter two: what Polars reads pickled functions with, and the time zones of a slim image.
ALWAYS = {"polars_cloud_emulator", "cloudpickle", "tzdata"}
POLARS = re.compile(r"_?polars($|_)")
"""Polars, its run-times and its plugins."""


class DeclaredImports(MetaPathFinder):
    """Finds no module but those that a worker has.

    Parameters
    ----------
    declared
        Top-level modules, beside those of Python and Polars.
    """

    def __init__(self, declared: Iterable[str]) -> None:
        self._allowed = {*sys.stdlib_module_names, *ALWAYS, *declared}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        module = fullname.partition(".")[0]
        if module in self._allowed or POLARS.match(module):
            return None
        raise ModuleNotFoundError(f"No module named '{fullname}'", name=fullname)
