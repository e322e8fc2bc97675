"""What goes to a worker process and comes back."""

from typing import Literal

import msgspec


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a successful query left behind."""

    destinations: list[str]
    file_type: Literal["parquet", "ipc", "csv", "ndjson"] | None
    n_rows: int
    head: bytes | None
    ir_plan: str | None = None
    """The optimized plan of a query that was planned only."""


Engine = Literal["streaming", "in-memory"]
PlanFormat = Literal["dot", "plain"]


class Job(msgspec.Struct, kw_only=True, tag=True):
    plan: str
    """File of the serialized plan."""
    engine: Engine
    optimization_flags: int | None
    temporary_uri: str
    """Where a result without a destination of its own goes."""
    part_name: str
    """Of a file in a directory, without its ending."""
    plan_only: PlanFormat | None
    """Format in which to tell the optimized plan instead of running it."""


class Hold(msgspec.Struct, tag=True):
    """Do nothing, as if a query ran, until a ``Kill``."""


class Kill(msgspec.Struct, tag=True):
    """End the query that runs, which fails by it."""


Command = Job | Hold | Kill


class Ready(msgspec.Struct, tag=True):
    """The next query can come."""

    pid: int
    """Of the process that will run it."""


class Failure(msgspec.Struct, tag=True):
    error: str
    """``Type: message``, from which the client makes the exception again."""


class Success(msgspec.Struct, tag=True):
    outcome: Outcome


Reply = Success | Failure
