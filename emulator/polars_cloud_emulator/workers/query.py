"""Execution of one query with Polars."""

import io
from pathlib import Path

import polars as pl

from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.model.jobs import Failure, Job, Outcome, Reply, Success
from polars_cloud_emulator.workers import plan as query_plan
from polars_cloud_emulator.workers import written_rows
from polars_cloud_emulator.workers.optimizations import optimizations, optimized

LONGEST_ERROR = 10_000
"""Maximum characters of an error message."""


def run(job: Job) -> Reply:
    """Run one job. An exception of the plan becomes a ``Failure``."""
    try:
        return Success(_run_plan(job))
    except InvalidRequest as error:
        return _failure("ComputeError", error)
    except UnicodeError as error:
        # The client cannot construct this type from a message alone.
        return _failure("ValueError", error)
    except Exception as error:
        return _failure(type(error).__name__, error)
    except pl.exceptions.PanicException as panic:
        return _failure("ComputeError", panic)
    except BaseException as error:
        # The client would raise the same type: after sys.exit() in a user's function, it would end.
        return _failure("RuntimeError", f"{type(error).__name__}: {error}")


def _failure(name: str, error: object) -> Failure:
    try:
        text = str(error)
    except Exception as broken:
        text = f"{type(broken).__name__} in its __str__"
    if len(text) > LONGEST_ERROR:
        text = f"{text[:LONGEST_ERROR]} [... {len(text):,} characters]"
    return Failure(f"{name}: {text}")


def _run_plan(job: Job) -> Outcome:
    prepared = query_plan.prepare(Path(job.plan), job.temporary_uri, job.part_name)
    if job.plan_only is not None:
        text = optimized(Path(job.plan), job.plan_only, job.engine, job.optimization_flags)
        return Outcome(destinations=[], file_type=None, n_rows=0, head=None, ir_plan=text)
    written_rows.reset()
    prepared.runnable().collect(
        engine=job.engine,
        optimizations=optimizations(job.optimization_flags),
    )
    head = written_rows.head()
    if head is None:
        head = prepared.empty_head()
    head_file = io.BytesIO()
    head.write_ipc(head_file)
    return Outcome(
        destinations=[sink.uri for sink in prepared.sinks],
        file_type=prepared.sinks[0].file_type if prepared.sinks else None,
        n_rows=written_rows.count(),
        head=head_file.getvalue(),
    )
