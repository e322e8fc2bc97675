"""A worker process: runs serialized LazyFrames with Polars, one at a time.

Jobs arrive on standard input and answers leave on standard output, each a 4-byte big-endian
length and a MessagePack document; an empty one comes first, when the process is ready. The process
ends when its standard input does, even in the middle of a query, so that it never outlives the
emulator.
"""

import io
import os
import queue
import struct
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec
import polars as pl

from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.model.jobs import Answer, Failure, Job, Outcome, Success
from polars_cloud_emulator.workers import plan as query_plan
from polars_cloud_emulator.workers import written_rows
from polars_cloud_emulator.workers.declared_imports import DeclaredImports
from polars_cloud_emulator.workers.optimizations import optimizations
from polars_cloud_emulator.workers.plan_text import optimized


def run(job: Job) -> Answer:
    """Run one job. What the plan raises is its failure, never the worker's."""
    try:
        return Success(_run_plan(job))
    except InvalidRequest as error:
        return Failure(f"ComputeError: {error}")
    except UnicodeError as error:
        # The client cannot construct this type from a message alone.
        return Failure(f"ValueError: {error}")
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")
    except pl.exceptions.PanicException as panic:
        return Failure(f"ComputeError: {panic}")


def _run_plan(job: Job) -> Outcome:
    prepared = query_plan.prepare(Path(job.plan), job.temporary_uri, job.part_name)
    if job.plan_only is not None:
        text = optimized(Path(job.plan), job.plan_only, job.engine, job.optimization_flags)
        return Outcome(destinations=[], file_type=None, n_rows=0, head=None, ir_plan=text)
    written_rows.forget()
    prepared.runnable().collect(
        engine=job.engine, optimizations=optimizations(job.optimization_flags)
    )
    head = written_rows.head()
    if head is None:
        head = prepared.head_without_rows()
    head_file = io.BytesIO()
    head.write_ipc(head_file)
    return Outcome(
        destinations=[sink.uri for sink in prepared.sinks],
        file_type=prepared.sinks[0].file_type if prepared.sinks else None,
        n_rows=written_rows.count(),
        head=head_file.getvalue(),
    )


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next document, or None at the end of the stream."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    body: bytes = stream.read(struct.unpack(">I", header)[0])
    return body


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # A user function that prints must not end up between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive() -> None:
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            jobs.put(frame)
        os._exit(0)

    def send(frame: bytes) -> None:
        answers.write(struct.pack(">I", len(frame)) + frame)
        answers.flush()

    sys.meta_path.insert(0, DeclaredImports(sys.argv[1:]))
    threading.Thread(target=receive, daemon=True).start()
    send(b"")
    while True:
        job = msgspec.msgpack.decode(jobs.get(), type=Job)
        send(msgspec.msgpack.encode(run(job)))


if __name__ == "__main__":
    main()
