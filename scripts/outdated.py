"""List pinned packages with newer versions, and the changes of each update in the lock.

This changes no file. To update, write the version into the listed files, and run `make lock`.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from subprocess import PIPE

from local_airflow import ROOT

LOCK = ROOT / "requirements-dev.lock"
PIN = re.compile(
    r"""^(?:    ")?([a-z][a-z0-9-]*)(\[[a-z,0-9]+\])?==([0-9][^",\s]*)""", re.MULTILINE
)


Pins = dict[str, tuple[str, list[str]]]
"""Version and files of each pin, by requirement without its version."""


def read_pins() -> Pins:
    """Return all pins; for Airflow, only the newest version."""
    pins: Pins = {}
    for file in ("requirements.txt", "pyproject.toml"):
        for name, extras, version in PIN.findall((ROOT / file).read_text()):
            pins.setdefault(name + extras, (version, [file]))
    pins["apache-airflow"][1].append("Dockerfile")
    return pins


def package(requirement: str) -> str:
    """Return a requirement without its extras."""
    return requirement.partition("[")[0]


def read_lock(text: str) -> dict[str, str]:
    """Return the versions in a lock, by package."""
    return dict(re.findall(r"^([a-z][a-z0-9-]*)==(\S+)", text, re.MULTILINE))


def resolve(requirements: Iterable[str], lock: Path, *options: str) -> dict[str, str]:
    """Return versions that fit together, by package; those in the lock where possible.

    Raises
    ------
    ValueError
        No versions fit together; the message is uv's.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "-"]
    command += ["--python-version", "3.11", "--no-build", "--output-file", str(lock), *options]
    found = subprocess.run(
        command, input="\n".join(requirements), stdout=subprocess.DEVNULL, stderr=PIPE, text=True
    )
    if found.returncode:
        raise ValueError(found.stderr.strip())
    return read_lock(lock.read_text())


def describe_change(requirement: str, newest: str, pins: Pins, lock: Path) -> str:
    """Return what else changes in the lock with a newer version of one requirement."""
    pinned = {name: version for name, (version, _) in pins.items()}
    lock.write_text(LOCK.read_text())
    before = resolve((f"{name}=={version}" for name, version in pinned.items()), lock)
    bumped = pinned | {requirement: newest}
    try:
        after = resolve((f"{name}=={version}" for name, version in bumped.items()), lock)
    except ValueError as error:
        return f"does not fit: {error}"
    changes = [
        f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name != package(requirement)
    ]
    return f"changes {', '.join(changes)}" if changes else "changes nothing else"


def main() -> None:
    """Print a line for each outdated pin."""
    pins = read_pins()
    with tempfile.TemporaryDirectory() as folder:
        newest = resolve(pins, Path(folder, "newest"), "--no-deps")
        for requirement, (version, files) in pins.items():
            name = package(requirement)
            if newest[name] != version:
                change = describe_change(requirement, newest[name], pins, Path(folder, "lock"))
                print(f"{name} {version} -> {newest[name]} ({', '.join(files)}): {change}")
    print("All other versions are the newest.")


if __name__ == "__main__":
    main()
