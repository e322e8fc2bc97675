"""Detection of user code in this process. User code arrives in pickled objects only."""

import sys

from polars_cloud_emulator.workers import written_rows

NOT_A_USERS = ("polars.io.cloud.", written_rows.NAME)
"""Prefixes of modules in the pickles of plans without user code: credentials, and our own."""

_names: set[str] = set()


def watch() -> None:
    """Start recording the modules that unpickling refers to."""
    sys.addaudithook(_note)


def has_run() -> bool:
    return bool(_names)


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        module = str(arguments[0])
        if not module.startswith(NOT_A_USERS):
            _names.add(module)
