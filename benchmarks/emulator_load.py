"""Load the emulator with a large input, a large file, and thousands of queries in a row.

Each figure is printed with a reference from the same run and its target. Linux only.
"""

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from polars_cloud_emulator.model.workspace import DATA_BUCKET
from polars_cloud_emulator.testing import RunningEmulator, running_emulator

INPUT_MB = 100
QUERIES, BATCH = 5_000, 250
SCANNED_ROWS, SCANS = 10**7, 5
SMALL_QUERIES, MAX_S3_MS = 50, 50.0
MAX_INPUT_RATIO, MAX_OTHER_CALL_MS, MAX_LATENCY_RATIO, MAX_SCAN_RATIO = 3.0, 50.0, 1.2, 3.0
PAUSE_S = 0.02


def used_mb(emulator_pid: int) -> float:
    """Return the memory of the emulator and its workers, in MB."""
    emulator = psutil.Process(emulator_pid)
    used = 0
    for each in (emulator, *emulator.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            used += each.memory_full_info().pss
    return used / 1e6


def watch(emulator: RunningEmulator, over: Any, most: Any) -> None:
    """Send the emulator's peak memory increase in MB and its slowest call in ms to `most`."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    most_mb, most_ms, before = 0.0, 0.0, used_mb(emulator.pid)
    most.put(None)
    while not over.wait(PAUSE_S):
        started = time.perf_counter()
        direct.open(f"{emulator.rest_url}/_emulator/health").read()
        most_ms = max(most_ms, (time.perf_counter() - started) * 1000)
        most_mb = max(most_mb, used_mb(emulator.pid) - before)
    most.put((most_mb, most_ms))


def verdict(value: float, target: float, unit: str = "") -> str:
    return f"target {target:g}{unit} {'met' if value <= target else 'missed'}"


def report_large_input(emulator: RunningEmulator, ctx: Any) -> None:
    """Send a frame of numbers that cannot be compressed."""
    import polars as pl

    rows = INPUT_MB * 10**6 // 8
    frame = pl.select(x=pl.int_range(rows).hash(seed=1))
    single = pl.LazyFrame({"x": [1]}).remote(ctx).single_node()
    single.execute()
    # In another process: the client blocks this process's interpreter for long.
    spawn = multiprocessing.get_context("spawn")
    over, most = spawn.Event(), spawn.SimpleQueue()
    watching = spawn.Process(target=watch, args=(emulator, over, most))
    watching.start()
    most.get()
    started = time.perf_counter()
    answer = frame.lazy().select(pl.col("x").max()).remote(ctx).single_node().execute()
    seconds = time.perf_counter() - started
    over.set()
    most_mb, other = most.get()
    watching.join()
    assert answer.head is not None
    assert answer.head.item() == frame["x"].max()
    memory = most_mb / INPUT_MB
    print(
        f"an input of {INPUT_MB} MB in memory: {seconds:.1f} s;",
        f"{memory:.1f} times its size in memory, {verdict(memory, MAX_INPUT_RATIO)};",
        f"slowest other call {other:.0f} ms,",
        verdict(other, MAX_OTHER_CALL_MS, " ms"),
    )


def report_scan(ctx: Any) -> None:
    """Compare a report on a file in the emulator's S3 and on disk, alternately."""
    import polars as pl

    uri = f"s3://{DATA_BUCKET}/benchmark/large.parquet"
    numbers = pl.int_range(SCANNED_ROWS)
    frame = pl.select(
        key=numbers.hash(seed=1) % 1000, a=numbers.hash(seed=2), b=numbers.hash(seed=3)
    )

    def seconds(run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        frame.write_parquet(file.name)
        frame.write_parquet(uri)
        megabytes = Path(file.name).stat().st_size / 1e6
        local, stored = (
            pl.scan_parquet(source)
            .filter(pl.col("a") > pl.col("b"))
            .group_by("key")
            .agg(
                pl.len(),
                pl.sum("a").alias("sum"),
                pl.mean("a").alias("mean"),
                pl.col("b").min().alias("least"),
                pl.col("b").max().alias("most"),
                pl.col("b").std().alias("spread"),
            )
            .sort("sum")
            for source in (file.name, uri)
        )
        remote = stored.remote(ctx).single_node()
        runs = [
            (seconds(lambda: local.collect(engine="streaming")), seconds(remote.execute))
            for _ in range(SCANS)
        ]
    here, there = (statistics.median(each) for each in zip(*runs, strict=True))
    print(
        f"a report on {megabytes:.0f} MB in the emulator's S3, median of {SCANS}: {there:.2f} s;",
        f"{there / here:.1f} times that from a local file ({here:.2f} s),",
        verdict(there / here, MAX_SCAN_RATIO),
    )


def report_small_query(ctx: Any) -> None:
    """Compare counting a small file in S3 and the same rows sent with the plan, alternately."""
    import polars as pl

    uri = f"s3://{DATA_BUCKET}/benchmark/small.parquet"
    frame = pl.select(x=pl.int_range(1_000))
    frame.write_parquet(uri)
    sent, stored = (
        lf.select(pl.len()).remote(ctx).single_node() for lf in (frame.lazy(), pl.scan_parquet(uri))
    )
    took = []
    for _ in range(SMALL_QUERIES):
        times = [time.perf_counter()]
        for query in (sent, stored):
            query.execute()
            times.append(time.perf_counter())
        took.append(((times[1] - times[0]) * 1000, (times[2] - times[1]) * 1000))
    without, with_s3 = (statistics.median(each) for each in zip(*took, strict=True))
    more = with_s3 - without
    print(
        f"a small query of a file in the emulator's S3, median of {SMALL_QUERIES}:",
        f"{with_s3:.0f} ms, {more:.0f} ms more than with the rows in the plan ({without:.0f} ms),",
        verdict(more, MAX_S3_MS, " ms"),
    )


def report_latency(ctx: Any) -> None:
    """Run many queries in a row; compare the last ones with the first."""
    import polars as pl

    query = pl.LazyFrame({"x": [1]}).remote(ctx).single_node()
    query.execute()
    took = []
    for _ in range(QUERIES):
        started = time.perf_counter()
        query.execute()
        took.append((time.perf_counter() - started) * 1000)
    first, last = statistics.median(took[:BATCH]), statistics.median(took[-BATCH:])
    ratio = last / first
    print(
        f"{QUERIES} queries in a row: median of the last {BATCH} {last:.1f} ms,",
        f"{ratio:.2f} times the first ({first:.1f} ms), {verdict(ratio, MAX_LATENCY_RATIO)}",
    )


if __name__ == "__main__":
    with running_emulator() as emulator:
        os.environ |= emulator.environment
        import polars_cloud as pc

        pc.authenticate(
            client_id=emulator.environment["POLARS_CLOUD_CLIENT_ID"],
            client_secret=emulator.environment["POLARS_CLOUD_CLIENT_SECRET"],
            interactive=False,
        )
        ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
        ctx.start()
        report_large_input(emulator, ctx)
        report_scan(ctx)
        report_small_query(ctx)
        report_latency(ctx)
