"""What a cluster declares that its workers need beside Python and Polars.

A cluster installs what is in its ``requirements_txt``. The emulator installs nothing: its workers
import that from where the emulator itself is installed, and a cluster that needs more fails.
"""

import functools
import importlib.metadata
from collections.abc import Mapping

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.workers.requirements_file import requirements_in


def importable_modules(requirements_txt: str | None) -> set[str]:
    """Top-level modules of what is declared, and of all that it needs.

    Raises
    ------
    InvalidRequest
        A line is no requirement, or is not met by what is installed beside the emulator.
    """
    modules: set[str] = set()
    seen: set[str] = set()
    pending = requirements_in(requirements_txt or "")
    for requirement in pending:
        _check_installed(requirement)
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or not _applies(requirement):
            continue
        seen.add(name)
        modules |= set(_modules_by_distribution().get(name, ()))
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        pending += map(Requirement, needed)
    return modules


def _check_installed(requirement: Requirement) -> None:
    if not _applies(requirement):
        return
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        found = "it is not installed here"
    else:
        if requirement.specifier.contains(version, prereleases=True):
            return
        found = f"{version} is installed here"
    raise InvalidRequest(
        f"the requirement '{requirement}' is not met: {found}, and the emulator's workers install "
        "nothing. Install it where the emulator is installed"
    )


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


@functools.cache
def _modules_by_distribution() -> Mapping[str, list[str]]:
    modules: dict[str, list[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            modules.setdefault(canonicalize_name(distribution), []).append(module)
    return modules
