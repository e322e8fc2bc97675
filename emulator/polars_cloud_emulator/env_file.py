"""The file that points a shell, a container or a test at the emulator: ``NAME=value`` lines."""

import shlex
from collections.abc import Mapping
from pathlib import Path

BEGIN = "POLARS_CLOUD_API_ADDR="
"""Of every such file."""


class NotAnEnvFile(Exception):
    """Somebody else's file stands where the variables are to be written."""


def write_env_file(path: Path, environment: Mapping[str, str]) -> None:
    """Write the variables, readable by this user alone and quoted for a shell.

    Raises
    ------
    NotAnEnvFile
        With the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path.is_file() and _is_replaceable(path.read_bytes())):
        raise NotAnEnvFile(
            f"{path} was not written by the emulator; delete it, or choose another file"
        )
    # Beside it, and then in its place: whoever reads it meanwhile reads the old or the new one.
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600, exist_ok=False)  # not one that another user has put there
    lines = (f"{name}={shlex.quote(value)}\n" for name, value in environment.items())
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file that ``write_env_file`` wrote."""
    assignments = (each.partition("=") for each in shlex.split(path.read_text(encoding="utf-8")))
    return {name: value for name, _, value in assignments}


def _is_replaceable(content: bytes) -> bool:
    return not content or content.startswith(BEGIN.encode())
