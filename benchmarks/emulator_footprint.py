"""Measure the emulator's start, its memory, and the delay of waiting for a query.

Each figure is compared with one of the same run: start and memory with a bare interpreter that
imports the same libraries, waiting with a client that polls. Linux only.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import boto3
import psutil

from polars_cloud_emulator.model.workspace import DATA_BUCKET
from polars_cloud_emulator.testing import RunningEmulator, running_emulator

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, DirectQuery, ProxyQuery

    Query = DirectQuery | ProxyQuery

MAX_START_S = 3.0
MAX_IDLE_MB = 250.0
MAX_WAIT_MS = 50.0

STARTS = 5
WORKERS = 4
QUERIES = 20
SHORTEST_QUERY_S = 0.25
POLL_INTERVAL_S = 0.5
SETTLE_TIMEOUT_S = 60.0
SMALL_MB, LARGE_MB = 1, 232
READS = 50

EMULATOR = [sys.executable, "-m", "polars_cloud_emulator", "serve", "--port-base", "0"]
BARE = "import polars, moto.server, hypercorn; print('ready', flush=True); input()"
BARE_INTERPRETER = [sys.executable, "-c", BARE]


class Memory(NamedTuple):
    """Memory of a process and its descendants, in MB (10**6 bytes)."""

    pss: float
    rss: float


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[tuple[int, float]]:
    """Start a process; yield its id and the seconds until its first line."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as popen:
        try:
            assert popen.stdout is not None
            if not popen.stdout.readline():
                raise RuntimeError(f"{command} ended with exit code {popen.wait()}")
            yield popen.pid, time.perf_counter() - started
        finally:
            popen.terminate()


def memory(pid: int) -> Memory:
    root = psutil.Process(pid)
    used = [part.memory_full_info() for part in (root, *root.children(recursive=True))]
    return Memory(sum(part.pss for part in used) / 1e6, sum(part.rss for part in used) / 1e6)


def settled_memory(pid: int) -> Memory:
    """Return the memory once its RSS has stayed within 1 MB for 3 s."""
    readings = deque([memory(pid)], maxlen=7)
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(0.5)
        readings.append(memory(pid))
        rss = [reading.rss for reading in readings]
        if len(readings) == readings.maxlen and max(rss) - min(rss) < 1.0:
            return readings[-1]
    raise TimeoutError(f"the memory did not settle within {SETTLE_TIMEOUT_S:.0f} s")


def measure_start(command: list[str]) -> float:
    with process(command) as (_, seconds):
        return seconds


def measure_idle(command: list[str]) -> Memory:
    with process(command) as (pid, _):
        return settled_memory(pid)


def measure_workers(emulator: RunningEmulator, clusters: Iterable["ComputeContext"]) -> Memory:
    """Return the memory that each cluster adds, with its first worker process."""
    before = settled_memory(emulator.pid)
    for cluster in clusters:
        cluster.start()
    after = settled_memory(emulator.pid)
    return Memory(*((now - then) / WORKERS for now, then in zip(after, before, strict=True)))


def measure_wait(
    emulator: RunningEmulator,
    ctx: "ComputeContext",
    query_seconds: float,
    wait: Callable[["Query"], object],
) -> float:
    """Return the milliseconds from the end of a query until `wait` returns."""
    import polars as pl

    def take_time(df: pl.DataFrame) -> pl.DataFrame:
        time.sleep(query_seconds)
        return df

    lf = pl.LazyFrame({"x": [1]}).map_batches(take_time)
    wait(lf.remote(ctx).single_node().execute(blocking=False))
    returned_at = datetime.now(UTC)
    ended_at = datetime.fromisoformat(emulator.state()["queries"][-1]["ended_at"])
    return (returned_at - ended_at).total_seconds() * 1000


def hold(query: "Query") -> None:
    query.await_result()


def poll(query: "Query") -> None:
    while not query.get_status().is_done():
        time.sleep(POLL_INTERVAL_S)


def against(target: float, unit: str, value: float) -> str:
    return f"target {target:g} {unit} {'met' if value <= target else 'missed'}"


def report_start() -> None:
    starts = [(measure_start(EMULATOR), measure_start(BARE_INTERPRETER)) for _ in range(STARTS)]
    start, bare = (median(seconds) for seconds in zip(*starts, strict=True))
    print(
        f"cold start, median of {STARTS}: {start:.2f} s, {against(MAX_START_S, 's', start)};",
        f"{start / bare:.2f} times a bare interpreter ({bare:.2f} s)",
    )


def report_idle() -> None:
    idle, bare = measure_idle(EMULATOR), measure_idle(BARE_INTERPRETER)
    print(
        f"idle without clusters: RSS {idle.rss:.0f} MB, {against(MAX_IDLE_MB, 'MB', idle.rss)};",
        f"{idle.rss / bare.rss:.2f} times a bare interpreter ({bare.rss:.0f} MB)\n"
        f"                       PSS {idle.pss:.0f} MB;",
        f"{idle.pss / bare.pss:.2f} times a bare interpreter ({bare.pss:.0f} MB)",
    )


def report_workers_and_waiting() -> None:
    with running_emulator() as emulator:
        os.environ |= emulator.environment
        # The client reads its environment when it is imported.
        import polars_cloud as pc

        pc.authenticate(
            client_id=emulator.environment["POLARS_CLOUD_CLIENT_ID"],
            client_secret=emulator.environment["POLARS_CLOUD_CLIENT_SECRET"],
            interactive=False,
        )
        ctx, *others = (
            pc.ComputeContext(workspace="playground", cpus=2, memory=4) for _ in range(WORKERS)
        )
        worker = measure_workers(emulator, [ctx, *others])
        print(
            f"each worker of {WORKERS} adds: RSS {worker.rss:.0f} MB,",
            f"PSS {worker.pss:.0f} MB",
        )

        measure_wait(emulator, ctx, 0, hold)  # the first query opens the connection
        # Spread the ends evenly over one poll interval.
        seconds = [SHORTEST_QUERY_S + POLL_INTERVAL_S * n / QUERIES for n in range(QUERIES)]
        waits = [
            (measure_wait(emulator, ctx, s, hold), measure_wait(emulator, ctx, s, poll))
            for s in seconds
        ]
    held, polled = zip(*waits, strict=True)
    print(
        f"await_result adds, of {QUERIES} queries: median {median(held):.1f} ms,",
        f"max {max(held):.1f} ms, {against(MAX_WAIT_MS, 'ms', max(held))};\n "
        f"polling every {POLL_INTERVAL_S:g} s adds {median(polled) / median(held):.0f} times",
        f"as much (median {median(polled):.0f} ms, max {max(polled):.0f} ms)",
    )


def report_part_reads() -> None:
    """Compare reading a small part of a small and of a large object, alternately."""
    with running_emulator() as emulator:
        s3 = boto3.client(
            "s3",
            endpoint_url=emulator.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=emulator.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=emulator.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=emulator.environment["AWS_REGION"],
        )
        for megabytes in (SMALL_MB, LARGE_MB):
            s3.put_object(Bucket=DATA_BUCKET, Key=str(megabytes), Body=bytes(megabytes * 10**6))

        def read_part(megabytes: int) -> float:
            started = time.perf_counter()
            part = f"bytes={megabytes * 500_000}-{megabytes * 500_000 + 999}"
            s3.get_object(Bucket=DATA_BUCKET, Key=str(megabytes), Range=part)["Body"].read()
            return (time.perf_counter() - started) * 1000

        reads = [(read_part(SMALL_MB), read_part(LARGE_MB)) for _ in range(READS)]
    small, large = (median(each) for each in zip(*reads, strict=True))
    print(
        f"1,000 bytes of an object of {LARGE_MB} MB, median of {READS}: {large:.1f} ms;",
        f"{large / small:.2f} times those of one of {SMALL_MB} MB ({small:.1f} ms)",
    )


if __name__ == "__main__":
    report_start()
    report_idle()
    report_part_reads()
    report_workers_and_waiting()
