"""Messages between the emulator and its worker processes."""

from typing import Literal

import msgspec


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a successful query."""

    destinations: list[str]
    file_type: Literal["parquet", "ipc", "csv", "ndjson"] | None
    n_rows: int
    head: bytes | None
    ir_plan: str | None = None
    """The optimized plan, if the query was only planned."""


Engine = Literal["streaming", "in-memory"]
PlanFormat = Literal["dot", "plain"]


class Job(msgspec.Struct, kw_only=True, tag=True):
    plan: str
    """Path of the serialized plan."""
    engine: Engine
    optimization_flags: int | None
    temporary_uri: str
    """Destination of a result for which the query names none."""
    part_name: str
    """Name of a file in a directory, without its extension."""
    plan_only: PlanFormat | None
    """Format in which to return the optimized plan without running it; None to run the plan."""


class Hold(msgspec.Struct, tag=True):
    """Occupy the worker process like a running query, until a ``Kill``."""


class Kill(msgspec.Struct, tag=True):
    """Kill the running query, which then fails."""


Command = Job | Hold | Kill


class Ready(msgspec.Struct, tag=True):
    """The worker process is ready for the next query."""

    pid: int
    """Process that will run the query."""


class Failure(msgspec.Struct, tag=True):
    error: str
    """``Type: message``, from which the client reconstructs the exception."""


class Success(msgspec.Struct, tag=True):
    outcome: Outcome


Reply = Success | Failure
