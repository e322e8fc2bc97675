"""What goes to a worker process and comes back."""

from typing import Literal

import msgspec


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a successful query left behind."""

    destinations: list[str]
    file_type: Literal["parquet", "ipc", "csv", "ndjson"] | None
    n_rows: int
    head: bytes | None


class Job(msgspec.Struct, kw_only=True):
    plan: str
    """File of the serialized plan."""
    engine: str
    optimization_flags: int | None
    temporary_uri: str
    """Where a result without a destination of its own goes."""
    part_name: str
    """Of a file in a directory, without its ending."""


class Failure(msgspec.Struct, tag=True):
    error: str
    """``Type: message``, from which the client makes the exception again."""


class Success(msgspec.Struct, tag=True):
    outcome: Outcome


Answer = Success | Failure
