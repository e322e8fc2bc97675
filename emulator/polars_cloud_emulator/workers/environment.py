"""The virtual environment of a worker, with only Polars and the requirements of its cluster.

Nothing is installed: the environment has symbolic links to the packages of the emulator's own.
"""

import csv
import functools
import importlib.metadata
import venv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ALWAYS = {"polars", "polars-runtime-32", "polars-runtime-64", "cloudpickle", "tzdata"}
"""Polars, cloudpickle for its pickled functions, and time zones, which slim images do not have."""


def create(folder: Path, distributions: Iterable[str]) -> Path:
    """Create the environment in a new folder, and return the path of its Python.

    Parameters
    ----------
    distributions
        Names of installed distributions to link besides Polars.
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
    """Return the packages of a distribution, and its files outside of packages, with their paths.

    Other folders are not linked as a whole: other distributions may share them.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return {}  # for example tzdata, on a system that has time zones
    record = distribution.read_text("RECORD") or ""
    paths = {PurePosixPath(path) for path, *_ in csv.reader(record.splitlines())}
    parts = set()
    for path in paths:
        if not {"..", "/", "__pycache__"} & {*path.parts[:1]}:
            folders = [*reversed(path.parents)][1:]
            parts.add(next((each for each in folders if each / "__init__.py" in paths), path))
    return {part: Path(str(distribution.locate_file(part))) for part in parts}
