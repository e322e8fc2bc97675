"""Other copies of the library that Python could import."""

import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]


def find_hidden_copies() -> list[str]:
    """Return path and version of each copy on Python's path but the imported one.

    Python imports the first that it finds: a wheel hides a copy in `plugins/`.
    """
    folders = {(Path(entry) / FOLDER.name).resolve() for entry in sys.path}
    return sorted(
        describe(folder) for folder in folders - {FOLDER} if (folder / "__init__.py").is_file()
    )


def describe(folder: Path) -> str:
    """Return the path of a copy, with its version."""
    text = (folder / "__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    return f"{folder} ({version[1] if version else 'no version'})"
