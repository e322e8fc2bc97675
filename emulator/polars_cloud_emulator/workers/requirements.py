"""The requirements of a cluster, besides Python and Polars.

Polars Cloud installs the ``requirements_txt`` of a cluster. The emulator installs nothing: its
workers import the packages from the emulator's own environment, and a cluster whose requirements
are not installed there fails.
"""

import importlib.metadata
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.workers.requirements_file import requirements_in


class Part(NamedTuple):
    """A distribution, or one of its extras."""

    name: NormalizedName
    extra: str


def declared_distributions(requirements_txt: str | None) -> set[str]:
    """Return the names of all required distributions, including their dependencies.

    Raises
    ------
    InvalidRequest
        A line is not a requirement, or its requirement is not installed.
    """
    seen: set[Part] = set()
    pending: list[Part] = []
    for requirement in requirements_in(requirements_txt or ""):
        if _applies(requirement):
            _check_installed(requirement)
            pending += _parts(requirement)
    while pending:
        part = pending.pop()
        if part in seen:
            continue
        seen.add(part)
        for requirement in _needed_by(part):
            if part.extra:
                _check_installed(requirement)
            pending += _parts(requirement)
    return {part.name for part in seen}


def _check_installed(requirement: Requirement) -> None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        found = "it is not installed"
    else:
        if requirement.specifier.contains(version, prereleases=True):
            return
        found = f"{version} is installed"
    raise InvalidRequest(
        f"the requirement '{requirement}' is not met: {found} in the emulator's environment, and "
        "the emulator installs nothing. Install it there"
    )


def _parts(requirement: Requirement) -> list[Part]:
    name = canonicalize_name(requirement.name)
    return [Part(name, extra) for extra in ("", *requirement.extras)]


def _needed_by(part: Part) -> list[Requirement]:
    try:
        lines = importlib.metadata.requires(part.name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [each for each in map(Requirement, lines) if _applies(each, part.extra)]


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
