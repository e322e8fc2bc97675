"""A worker process, which forks a process for queries and kills it with all its descendants.

The worker itself imports Polars, so that a fork is fast, but runs no query, so that each fork
starts in the same state. A process that has run a user's code is replaced before the next query, so
that a query cannot find threads, variables or files of an earlier one. The worker ends when its
connection to the emulator closes.
"""

import contextlib
import os
import select
import shutil
import socket
import time
import traceback
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec
import polars as pl

from polars_cloud_emulator.model.jobs import (
    Command,
    Failure,
    Hold,
    Job,
    Kill,
    Ready,
    Reply,
    Success,
)
from polars_cloud_emulator.workers import plan, processes, query, user_code, written_rows
from polars_cloud_emulator.workers.connection import Connection

EXIT_TIMEOUT = 1.0
"""Seconds in which a process must end after it has closed its connection."""
STALL_TIMEOUT = 5.0
"""Seconds in which the next part of a reply must follow."""


class Done(NamedTuple):
    """Message from the process of a query when the query has ended."""

    answer: Reply
    is_clean: bool
    """True if the process can run another query."""


class QueryProcess:
    """A process for queries, forked from the worker."""

    def __init__(self, emulator: Connection, folder: Path) -> None:
        ours, theirs = map(Connection, socket.socketpair())
        worker = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            emulator.close()
            ours.close()
            processes.die_with_parent(worker)
            _run_queries(theirs, folder)
        theirs.close()
        self.connection = ours
        self._is_gone = False

    def exit_failure(self) -> Failure:
        """Return why there is no reply from a process that has closed its connection."""
        deadline = time.monotonic() + EXIT_TIMEOUT
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._is_gone = True
                how = processes.describe_exit(os.waitstatus_to_exitcode(status))
                return _worker_failure(f"died with {how}")
            time.sleep(0.001)
        return _worker_failure("closed its connection to the emulator")

    def end(self) -> None:
        """Kill the process and all its descendants."""
        if not self._is_gone:
            processes.kill_group(self.pid)
            self._is_gone = True
        processes.end_children()
        self.connection.close()


def serve(end: socket.socket, folder: Path) -> None:
    """Run queries until the emulator closes the connection.

    Parameters
    ----------
    folder
        Working directory of each process, empty at its start. The parent folder is the worker's.
    """
    processes.adopt_orphans()
    # Cached before the fork, so that the processes inherit the values.
    plan.own_header()
    written_rows.counting_steps()
    emulator = Connection(end)
    # The emulator has closed its connection, or a process died before it was ready.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            _serve_from_one_process(emulator, folder)
    shutil.rmtree(folder.parent, ignore_errors=True)


def _serve_from_one_process(emulator: Connection, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    process = QueryProcess(emulator, folder)
    try:
        process.connection.receive()  # the process is ready
        is_clean = True
        while is_clean:
            emulator.send(msgspec.msgpack.encode(Ready(process.pid)))
            done = _next_done(emulator, process)
            if done is None:
                return
            answer, is_clean = done
            if not is_clean:
                process.end()
            emulator.send(msgspec.msgpack.encode(answer))
    finally:
        process.end()
        shutil.rmtree(folder)


def _next_done(emulator: Connection, process: QueryProcess) -> Done | None:
    """Wait for the end of the next query; None if the process ended before it got a query.

    Raises
    ------
    EOFError
        The emulator has closed its connection.
    """
    is_busy = False
    while True:
        timeout = STALL_TIMEOUT if process.connection.has_part else None
        readable, _, _ = select.select([process.connection, emulator], [], [], timeout)
        if not readable:
            return _NO_ANSWER
        if process.connection in readable:
            try:
                frame = process.connection.receive_part()
            except (EOFError, ConnectionError):
                return Done(process.exit_failure(), False) if is_busy else None
            if frame is not None:
                return _decoded(frame)
        else:
            command: Command = msgspec.msgpack.decode(emulator.receive(), type=Command)
            match command:
                case Job():
                    process.connection.send(msgspec.msgpack.encode(command))
                    is_busy = True
                case Hold():
                    is_busy = True
                case Kill() if is_busy:
                    return Done(_worker_failure("died with SIGKILL"), False)


def _decoded(frame: bytes) -> Done:
    try:
        done: Done = msgspec.msgpack.decode(frame, type=Done)
    except (msgspec.DecodeError, UnicodeError):
        return _NO_ANSWER
    return done


def _worker_failure(did: str) -> Failure:
    return Failure(f"RuntimeError: worker process {did}")


_NO_ANSWER = Done(_worker_failure("wrote an invalid reply to its connection"), False)


def _run_queries(connection: Connection, folder: Path) -> NoReturn:
    try:
        os.setsid()
        os.chdir(folder)
        processes.prefer_as_oom_victim()
        os.register_at_fork(after_in_child=connection.close)
        # Starts Polars' threads, so that the first query does not wait for them.
        pl.LazyFrame({"x": [0]}).collect(engine="streaming")
        user_code.watch()
        # Up to here, the emulator reads errors on stderr. From here on, a user's code may print.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        connection.send(b"")
        while True:
            job = msgspec.msgpack.decode(connection.receive(), type=Job)
            answer = query.run(job)
            is_clean = isinstance(answer, Success) and not user_code.has_run()
            connection.send(msgspec.msgpack.encode(Done(answer, is_clean)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
