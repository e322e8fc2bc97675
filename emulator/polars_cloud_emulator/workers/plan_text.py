"""Polars' explanation of a plan, made in a separate process, because a plan may run any code."""

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping
from pathlib import Path

import msgspec
import polars as pl

from polars_cloud_emulator.model.jobs import Engine, PlanFormat
from polars_cloud_emulator.workers.isolated_python import python
from polars_cloud_emulator.workers.optimizations import optimized

TIMEOUT = 20.0
"""Seconds until an explanation times out: a scan may wait for its files."""


class PlanText(msgspec.Struct):
    """Explanation of a plan; ``error`` is the reason if a text is missing."""

    unoptimized: str | None = None
    optimized: str | None = None
    error: str | None = None


async def explain(
    plan: Path,
    environment: Mapping[str, str],
    plan_format: PlanFormat,
    engine: Engine,
    optimization_flags: int | None,
) -> PlanText:
    """Return Polars' explanation of a plan.

    Parameters
    ----------
    plan
        Path of the serialized plan.
    environment
        A worker's environment variables: Polars reads the schema of scanned files.
    plan_format
        Format of the optimized plan; the unoptimized plan is always text.
    """
    arguments = msgspec.json.encode((str(plan), plan_format, engine, optimization_flags))
    process = await asyncio.create_subprocess_exec(
        *python("polars_cloud_emulator.workers.plan_text", arguments.decode()),
        stdin=DEVNULL,
        stdout=PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT)
    except TimeoutError:
        return PlanText(error=f"Polars did not explain the plan within {TIMEOUT:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    try:
        return msgspec.json.decode(output, type=PlanText)
    except msgspec.DecodeError:
        return PlanText(error="The process that explains the plan died")


def main() -> None:
    answer = os.dup(sys.stdout.fileno())
    # Output of a user's function must not become part of the reply.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    plan, plan_format, engine, optimization_flags = msgspec.json.decode(
        sys.argv[1], type=tuple[str, PlanFormat, Engine, int | None]
    )
    text = PlanText()
    try:
        text.unoptimized = pl.LazyFrame.deserialize(plan).explain(optimized=False)
        text.optimized = optimized(Path(plan), plan_format, engine, optimization_flags)
    except (Exception, pl.exceptions.PanicException) as error:
        text.error = f"Polars cannot explain the plan here: {error}"
    with os.fdopen(answer, "wb") as file:
        file.write(msgspec.json.encode(text))


if __name__ == "__main__":
    main()
