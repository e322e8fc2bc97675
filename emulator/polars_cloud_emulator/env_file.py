"""The file that points a shell, a container or a test at the emulator: ``NAME=value`` lines."""

import shlex
from collections.abc import Mapping
from pathlib import Path


def write_env_file(path: Path, environment: Mapping[str, str]) -> None:
    """Write the variables, readable by this user alone and quoted for a shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Writing to a file that is there would keep its mode.
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(
        "".join(f"{name}={shlex.quote(value)}\n" for name, value in environment.items())
    )


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file that ``write_env_file`` wrote."""
    assignments = (line.partition("=") for line in path.read_text().splitlines())
    return {name: shlex.split(value)[0] for name, _, value in assignments}
