"""The Python of a worker: a virtual environment with what its cluster declares, and nothing else.

Nothing is installed into it: it links to the emulator's own packages.
"""

import csv
import functools
import importlib.metadata
import venv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ALWAYS = {"polars", "polars-runtime-32", "polars-runtime-64", "cloudpickle", "tzdata"}
"""Polars, what it reads pickled functions with, and the time zones of a slim image."""


def create(folder: Path, distributions: Iterable[str]) -> Path:
    """Create the environment in a new folder; its Python.

    Parameters
    ----------
    distributions
        Names of what it has beside Polars; all of it is installed here.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    [site_packages] = folder.glob("lib/python*/site-packages")
    for name in {*ALWAYS, *distributions}:
        for part, source in _parts(name).items():
            target = site_packages / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(source)
    return folder / "bin" / "python"


@functools.cache
def _parts(name: str) -> dict[PurePosixPath, Path]:
    """The packages of a distribution, and its files outside of them, with where they are.

    Any other folder may be shared with distributions that are not declared.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return {}  # as tzdata, where the system has the time zones
    record = distribution.read_text("RECORD") or ""
    paths = {PurePosixPath(path) for path, *_ in csv.reader(record.splitlines())}
    parts = set()
    for path in paths:
        if not {"..", "/", "__pycache__"} & {*path.parts[:1]}:
            folders = [*reversed(path.parents)][1:]
            parts.add(next((each for each in folders if each / "__init__.py" in paths), path))
    return {part: Path(str(distribution.locate_file(part))) for part in parts}
