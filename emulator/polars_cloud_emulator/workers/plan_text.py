"""A query's plan as Polars explains it, made in a process of its own: a plan may hold any code."""

import asyncio
import contextlib
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from polars_cloud_emulator.workers.isolated_python import python

TIMEOUT = 20.0
"""Seconds until an explanation is given up: a scan may wait for its files."""
LONGEST = 100_000
"""Characters of an explanation."""


async def explain(plan: Path, environment: Mapping[str, str]) -> str:
    """The plan before its optimization, or why there is none to be shown.

    Parameters
    ----------
    plan
        File of the serialized plan.
    environment
        What a worker has to reach the object store: Polars looks at the files of a scan.
    """
    process = await asyncio.create_subprocess_exec(
        *python("polars_cloud_emulator.workers.plan_text", str(plan)),
        stdin=DEVNULL,
        stdout=PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT)
    except TimeoutError:
        return f"Polars did not explain the plan within {TIMEOUT:.0f} s."
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return output.decode()[:LONGEST]


def main() -> None:
    try:
        lf = pl.LazyFrame.deserialize(sys.argv[1])
        print(lf.explain(optimized=False))
    except Exception as error:
        print(f"Polars cannot explain the plan here: {error}")


if __name__ == "__main__":
    main()
