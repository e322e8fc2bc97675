"""`worker_handle.py`: a process may be killed at any moment, and the next plan gets a new one."""

import asyncio
from pathlib import Path

import pytest

from polars_cloud_emulator.workers.handle import Worker
from polars_cloud_emulator.workers.isolated_python import worker_environment


def test_process_that_is_killed_as_it_becomes_ready_is_not_handed_out(tmp_path: Path) -> None:
    async def kill_first() -> bool:
        worker = Worker(worker_environment(), pytest.fail, tmp_path, ())
        try:
            while worker._process is None:
                await asyncio.sleep(0)
            first = worker._process
            while "bytes" not in repr(first.stdout):  # it has said that it is ready
                await asyncio.sleep(0)
            worker.kill()
            return await worker.ready() is not first
        finally:
            await worker.close()

    assert asyncio.run(asyncio.wait_for(kill_first(), 60))
