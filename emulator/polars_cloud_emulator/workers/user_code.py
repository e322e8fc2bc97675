"""Whether a user's code has run in this process: it comes in pickled objects only."""

import sys

from polars_cloud_emulator.workers import written_rows

NOT_A_USERS = ("polars.io.cloud.", written_rows.NAME)
"""Begin the names of modules that a plan without a user's code names: for credentials, and ours."""

_names: set[str] = set()


def watch() -> None:
    """Begin to look at what is read from pickled objects."""
    sys.addaudithook(_note)


def has_run() -> bool:
    return bool(_names)


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        module = str(arguments[0])
        if not module.startswith(NOT_A_USERS):
            _names.add(module)
