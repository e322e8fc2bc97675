"""One worker of a cluster, seen from the emulator: a process, replaced whenever it dies."""

import asyncio
import contextlib
import signal
import struct
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import msgspec

from polars_cloud_emulator.model.jobs import Answer, Job
from polars_cloud_emulator.workers.isolated_python import python


class WorkerDied(Exception):
    """The process ended before it answered."""


class Worker:
    """One worker of a cluster.

    Parameters
    ----------
    environment
        Variables of the process.
    give_up
        Called with the reason when a process cannot be started; there will be no further one.
    folder
        Working directory of the process.
    modules
        Top-level modules that it may import, beside those of Python and Polars.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        give_up: Callable[[str], None],
        folder: Path,
        modules: Iterable[str],
    ) -> None:
        self._environment = environment
        self._folder = folder
        self._modules = modules
        self._give_up = give_up
        self._process: Process | None = None
        self._ready = asyncio.Event()
        self._killed = False
        self._supervisor = asyncio.create_task(self._keep_running())

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def ready(self) -> Process | None:
        """The process that takes jobs, once there is one; None if none could be started.

        Until a job is done, the process may have died and been replaced: the job ends with it.
        """
        await self._ready.wait()
        while self._is_dead() and not self._supervisor.done():
            await asyncio.sleep(0)  # the supervisor is about to notice
            await self._ready.wait()
        return self._process

    def _is_dead(self) -> bool:
        return self._process is not None and self._process.returncode is not None

    def kill(self) -> None:
        """End the process now, whether or not it is ready."""
        self._killed = True
        self._ready.clear()
        if self._process is not None:
            kill(self._process)

    async def close(self) -> None:
        self._supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervisor
        self._ready.set()  # nobody shall wait for a process that will not come

    async def _keep_running(self) -> None:
        try:
            while True:
                self._process = process = await asyncio.create_subprocess_exec(
                    *python("polars_cloud_emulator.workers.main", *self._modules),
                    stdin=PIPE,
                    stdout=PIPE,
                    env=self._environment,
                    cwd=self._folder,
                    # Ctrl-C in the emulator's terminal is the emulator's to handle.
                    start_new_session=True,
                )
                self._killed = False
                try:
                    await _read_frame(process)
                except asyncio.IncompleteReadError:
                    if not self._killed:
                        self._give_up(f"a worker could not start: {await _exit_of(process)}")
                        return
                if not self._killed:  # a process that was killed as it became ready is about to die
                    self._ready.set()
                await process.wait()
                self._ready.clear()
        except (OSError, ValueError) as error:  # variables that no process can have
            self._give_up(f"a worker could not start: {error}")
        finally:
            self.kill()
            if self._process is not None:
                await self._process.wait()


async def run(process: Process, job: Job) -> Answer:
    """Run one job on a process that is ready.

    Raises
    ------
    WorkerDied
        With the way the process ended.
    """
    assert process.stdin is not None
    frame = msgspec.msgpack.encode(job)
    try:
        process.stdin.write(struct.pack(">I", len(frame)) + frame)
        await process.stdin.drain()
        answer = await _read_frame(process)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise WorkerDied(f"worker process died with {await _exit_of(process)}") from None
    decoded: Answer = msgspec.msgpack.decode(answer, type=Answer)
    return decoded


async def hang(process: Process) -> NoReturn:
    """Hold a process without a job.

    Raises
    ------
    WorkerDied
        With the way the process ended.
    """
    raise WorkerDied(f"worker process died with {await _exit_of(process)}")


def kill(process: Process) -> None:
    """End a process now; nothing softer reaches a thread in native code."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()


async def _read_frame(process: Process) -> bytes:
    assert process.stdout is not None
    [length] = struct.unpack(">I", await process.stdout.readexactly(4))
    return await process.stdout.readexactly(length)


async def _exit_of(process: Process) -> str:
    code = await process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
