"""Notices what a DAG file does beyond defining a DAG while it is parsed, and in which line."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from airflow.secrets.base_secrets import BaseSecretsBackend

IMPORTS = {"polars", "polars_cloud"}
CALLS = {"socket.connect", "socket.getaddrinfo", "socket.sendto"}


class Touch(NamedTuple):
    """What was touched, and the lines that led there, the DAG file's first."""

    kind: str
    what: str
    lines: list[tuple[str, int]]


touches: list[Touch] = []


def note(kind: str, what: str) -> None:
    lines = []
    frame = sys._getframe(1)
    while frame:
        lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    touches.append(Touch(kind, what, lines[::-1]))


class RecordingSecrets(BaseSecretsBackend):
    """Holds nothing, and is asked before every other secrets backend."""

    def get_conn_value(self, conn_id: str, team_name: str | None = None) -> None:
        note("secret", f"Connection {conn_id!r}")

    def get_variable(self, key: str, team_name: str | None = None) -> None:
        note("secret", f"Variable {key!r}")


class RecordingFinder:
    """Finds nothing, and is asked before every other finder of modules."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: object = None) -> None:
        if name in IMPORTS:
            note("import", name)


def watch() -> None:
    """Notice all that this process does from now on."""
    sys.meta_path.insert(0, RecordingFinder)  # type: ignore[arg-type]
    sys.addaudithook(lambda event, args: note("call", str(args)) if event in CALLS else None)
