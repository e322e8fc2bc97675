"""The env file: ``NAME=value`` lines with which a shell, container or test uses the emulator."""

import shlex
from collections.abc import Mapping
from pathlib import Path

BEGIN = "POLARS_CLOUD_API_ADDR="
"""First bytes of every env file."""


class NotAnEnvFile(Exception):
    """The path of the env file is a file that the emulator did not write."""


def write_env_file(path: Path, environment: Mapping[str, str]) -> None:
    """Write the variables, quoted for a shell, to a file that only this user can read.

    Raises
    ------
    NotAnEnvFile
        The path exists, and the emulator did not write it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path.is_file() and _is_replaceable(path.read_bytes())):
        raise NotAnEnvFile(
            f"{path} was not written by the emulator; delete it, or choose another file"
        )
    # Replaced atomically: a concurrent reader gets the old or the new file.
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600, exist_ok=False)  # fails if another user has created the file
    lines = (f"{name}={shlex.quote(value)}\n" for name, value in environment.items())
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)


def read_env_file(path: Path) -> dict[str, str]:
    """Return the variables of a file that ``write_env_file`` wrote."""
    assignments = (each.partition("=") for each in shlex.split(path.read_text(encoding="utf-8")))
    return {name: value for name, _, value in assignments}


def _is_replaceable(content: bytes) -> bool:
    return not content or content.startswith(BEGIN.encode())
