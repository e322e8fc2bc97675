"""The emulator's handle of a worker: starts its process, and replaces the process if it dies."""

import asyncio
import contextlib
import json
import os
import socket
import tempfile
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path

import msgspec

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
from polars_cloud_emulator.workers import environment, processes, start
from polars_cloud_emulator.workers.connection import LENGTH
from polars_cloud_emulator.workers.isolated_python import SEARCH_PATH

EXIT_GRACE_SECONDS = 5.0
"""Seconds until a worker that should end its query, or itself, is killed."""
PACKAGE_PATH = (str(SEARCH_PATH), str(Path(msgspec.__file__).parents[1]))
"""Import paths of the emulator's package and of msgspec."""

FOLDERS = ("HOME", "TMPDIR", "POLARS_OOC_SPILL_DIR")
"""Variables that are set to the working folder of a query."""
LIBRARIES = {name: os.environ[name] for name in {"LD_LIBRARY_PATH"} & os.environ.keys()}
"""Variables with which this Python finds its shared libraries."""


class Worker:
    """One worker of a cluster, with its own folder and virtual environment.

    Parameters
    ----------
    variables
        Environment variables of the queries.
    on_start_failure
        Called with the reason if a process cannot start. The worker does not try again.
    distributions
        Distributions that queries can import, besides Python and Polars.
    """

    def __init__(
        self,
        variables: Mapping[str, str],
        on_start_failure: Callable[[str], None],
        distributions: Iterable[str],
    ) -> None:
        self._variables = variables
        self._on_start_failure = on_start_failure
        self._distributions = distributions
        self.pid: int | None = None
        """Process of the running query, or of the next one."""
        self._process: Process | None = None
        self._commands: StreamWriter | None = None
        self._answer: asyncio.Future[Reply] | None = None
        self._ready = asyncio.Event()
        self._supervisor = asyncio.create_task(self._keep_running())
        self._has_ended = False

    async def ready(self) -> bool:
        """Wait until the worker is ready for a query; False if its process cannot start."""
        while not self._ready.is_set():
            await self._ready.wait()
        return not self._has_ended

    async def run(self, job: Job | Hold) -> Reply:
        """Run one job on a ready worker. If the process dies, the reply is a failure."""
        if self._has_ended or not self._ready.is_set():
            return _worker_died("SIGKILL")
        self._ready.clear()
        self._answer = asyncio.get_running_loop().create_future()
        self._send(job)
        return await self._answer

    def kill(self) -> None:
        """Kill the running query, if any, with all processes that it has started."""
        if self._answer is not None and not self._answer.done():
            self._send(Kill())
            asyncio.get_running_loop().call_later(
                EXIT_GRACE_SECONDS, self._kill_process, self._answer
            )

    async def close(self) -> None:
        """End the worker process, even if it runs a query."""
        self._supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervisor

    def _send(self, command: Command) -> None:
        assert self._commands is not None
        frame = msgspec.msgpack.encode(command)
        self._commands.write(LENGTH.pack(len(frame)) + frame)

    def _kill_process(self, unless: asyncio.Future[Reply]) -> None:
        if not unless.done() and self._process is not None:
            _kill(self._process)

    def _end_query(self, answer: Reply) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    async def _keep_running(self) -> None:
        try:
            while True:
                async with self._running_process() as (process, replies):
                    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                        while True:
                            self._receive(await _read_frame(replies))
                    self._ready.clear()
                if self.pid is None:
                    self._on_start_failure(
                        f"a worker could not start: {await _last_stderr_line(process)}"
                    )
                    return
                self._end_query(_worker_died(_exit_of(process)))
        except OSError as error:
            self._on_start_failure(f"a worker could not start: {error}")
        finally:
            self._has_ended = True
            self._ready.set()  # releases those who wait for the process
            self._end_query(_worker_died("SIGKILL"))

    def _receive(self, frame: bytes) -> None:
        reply: Ready | Reply = msgspec.msgpack.decode(frame, type=Ready | Success | Failure)
        if isinstance(reply, Ready):
            self.pid = reply.pid
            self._ready.set()
        else:
            self._end_query(reply)

    @contextlib.asynccontextmanager
    async def _running_process(self) -> AsyncIterator[tuple[Process, StreamReader]]:
        """Start a process, and yield it with its replies; at the end, delete it and its folder.

        Processes that it has started are killed.
        """
        with tempfile.TemporaryDirectory(
            prefix="polars-cloud-", ignore_cleanup_errors=True
        ) as name:
            folder = Path(name)
            self.pid = None
            python = environment.create(folder / "python", self._distributions)
            ours, theirs = socket.socketpair()
            replies, self._commands = await asyncio.open_connection(sock=ours)
            with contextlib.closing(self._commands):
                with theirs:
                    self._process = process = await self._start(python, theirs, folder / "work")
                try:
                    yield process, replies
                finally:
                    self._commands.close()
                    # A process that is still starting does not notice the closed connection.
                    await _end(process, folder, grace_seconds=EXIT_GRACE_SECONDS if self.pid else 0)

    async def _start(self, python: Path, end: socket.socket, work: Path) -> Process:
        work.mkdir()
        process = await asyncio.create_subprocess_exec(
            *(python, "-I", start.__file__, str(end.fileno()), work, *PACKAGE_PATH),
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=PIPE,
            pass_fds=[end.fileno()],
            # The cluster's variables are set later, because Python and the loader use some of them.
            env=dict.fromkeys(FOLDERS, str(work)) | LIBRARIES,
            cwd=work.parent,
            # Ctrl-C in the emulator's terminal must not reach the workers.
            start_new_session=True,
        )
        path = f"{python.parent}{os.pathsep}{self._variables.get('PATH', os.defpath)}"
        assert process.stdin is not None
        process.stdin.write(json.dumps({**self._variables, "PATH": path}).encode())
        process.stdin.close()
        return process


async def _read_frame(replies: StreamReader) -> bytes:
    [length] = LENGTH.unpack(await replies.readexactly(LENGTH.size))
    return await replies.readexactly(length)


async def _end(process: Process, folder: Path, grace_seconds: float) -> None:
    """Wait for the end of a process whose connection is closed, and kill it after a timeout."""
    try:
        await asyncio.wait_for(process.wait(), grace_seconds)
    except TimeoutError:
        _kill(process)
        await process.wait()
    if process.returncode != 0:
        processes.kill_processes_of(folder)


def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


async def _last_stderr_line(process: Process) -> str:
    assert process.stderr is not None
    lines = (await process.stderr.read()).decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), _exit_of(process))


def _exit_of(process: Process) -> str:
    return processes.describe_exit(process.returncode or 0)


def _worker_died(how: str) -> Failure:
    return Failure(f"RuntimeError: worker process died with {how}")
