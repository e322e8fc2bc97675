"""Find other copies of the library that Python could import."""

import os
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]


def find_hidden_copies() -> list[str]:
    """Return path and version of each copy on Python's path, except the imported one.

    Python imports the first copy that it finds, so an installed wheel hides a copy in `plugins/`.
    """
    folders = {(Path(entry) / FOLDER.name).resolve() for entry in sys.path}
    return sorted(
        describe(folder)
        for folder in folders - {FOLDER}
        # Unlike `Path.is_file`, `os.path.isfile` does not raise for an unreadable folder.
        if os.path.isfile(folder / "__init__.py")
    )


def describe(folder: Path) -> str:
    """Return the path and version of a copy, as text."""
    try:
        text = (folder / "__init__.py").read_text()
    except OSError:  # in a zip
        text = ""
    version = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    return f"{folder} ({version[1] if version else 'no version'})"
