"""Isolation of queries: a query cannot affect later queries or the emulator."""

import ast
import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
from polars.io.plugins import register_io_source

from emulator.tests.command_line import Served
from emulator.tests.processes import descendants, is_running, none_running
from emulator.tests.user_functions import ask_worker, asking
from polars_cloud_emulator.testing import RunningEmulator, eventually

StartCluster = Callable[..., Any]
RunClient = Callable[..., str]


def starting(pids: Path, *, then: Callable[[], object] = int) -> Callable[[], object]:
    """Return a user's function that starts processes of each kind, and records their ids."""

    def start_daemon() -> int:
        """Start a process that has left its parent, its group and its session."""
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.setsid()
            daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
            os.write(writer, str(daemon.pid).encode())
            os._exit(0)
        return int(os.read(reader, 20))

    def start() -> object:
        child = os.fork()
        if child == 0:
            time.sleep(600)
        spawned = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        spawned.start()
        started = [
            child,
            spawned.pid,
            subprocess.Popen(["sleep", "600"]).pid,
            subprocess.Popen(["sleep", "600"], start_new_session=True).pid,
            start_daemon(),
        ]
        partial = pids.with_suffix(".partial")
        partial.write_text(repr([os.getpid(), *started]))
        partial.rename(pids)
        return then()

    return start


def started(pids: Path) -> list[int]:
    eventually(pids.exists)
    return list(ast.literal_eval(pids.read_text()))


def test_what_a_query_starts_ends_with_it(start_cluster: StartCluster, tmp_path: Path) -> None:
    context = start_cluster()
    ask_worker(context, starting(tmp_path / "pids"))
    assert none_running(started(tmp_path / "pids"))
    assert ask_worker(context, lambda: "next") == "next"


def cancel(context: Any, query: Any, emulator: RunningEmulator) -> None:
    query.cancel()


def stop(context: Any, query: Any, emulator: RunningEmulator) -> None:
    context.stop()


def reset(context: Any, query: Any, emulator: RunningEmulator) -> None:
    emulator.reset()


def kill_process_of_the_query(context: Any, query: Any, emulator: RunningEmulator) -> None:
    [pid] = worker_pids(emulator)
    os.kill(pid, signal.SIGKILL)


def kill_worker(context: Any, query: Any, emulator: RunningEmulator) -> None:
    [pid] = worker_pids(emulator)
    psutil.Process(pid).parent().kill()


def stop_worker_and_cancel(context: Any, query: Any, emulator: RunningEmulator) -> None:
    [pid] = worker_pids(emulator)
    psutil.Process(pid).parent().suspend()
    query.cancel()


@pytest.mark.parametrize(
    "end",
    [cancel, stop, reset, kill_process_of_the_query, kill_worker, stop_worker_and_cancel],
)
def test_what_a_query_started_ends_however_the_query_does(
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    tmp_path: Path,
    end: Callable[[Any, Any, RunningEmulator], None],
) -> None:
    context = start_cluster()
    pids = tmp_path / "pids"
    starter = starting(pids, then=lambda: time.sleep(600))
    query = asking(starter).remote(context).execute(blocking=False)
    processes = started(pids)
    assert all(map(is_running, processes))
    end(context, query, emulator)
    eventually(lambda: none_running(processes))
    if end not in {stop, reset}:
        assert ask_worker(context, lambda: "next") == "next"


def test_what_a_query_started_ends_when_the_emulator_is_killed(
    serve: Callable[..., Served], run_client: RunClient, tmp_path: Path
) -> None:
    served = serve("--port-base", 0)
    code = f"""
import time
from pathlib import Path
from emulator.tests.test_worker_processes import asking, starting
ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
ctx.start()
start = starting(Path("{tmp_path}/pids"), then=lambda: time.sleep(600))
asking(start).remote(ctx).execute(blocking=False)
"""
    run_client(served.environment, code)
    processes = {*started(tmp_path / "pids"), *descendants(served.pid)}
    served.stop(signal.SIGKILL)
    eventually(lambda: none_running(processes))


def test_workers_leave_no_dead_process_behind(
    emulator: RunningEmulator, start_cluster: StartCluster, tmp_path: Path
) -> None:
    context = start_cluster()
    for number in range(3):
        ask_worker(context, starting(tmp_path / str(number)))
        # Runs longer than the query's process; the next query waits for its end.
        ask_worker(context, lambda: "next")
    children = psutil.Process(emulator.pid).children(recursive=True)
    assert psutil.STATUS_ZOMBIE not in {child.status() for child in children}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pool_of_processes_works_in_a_users_function(
    start_cluster: StartCluster, method: str
) -> None:
    def lengths() -> object:
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            return [*pool.map(len, ["a", "bc"])]

    assert ask_worker(start_cluster(), lengths) == "[1, 2]"


def test_standard_input_of_a_users_function_is_empty(start_cluster: StartCluster) -> None:
    context = start_cluster()
    read = ask_worker(context, lambda: subprocess.run(["cat"], stdout=subprocess.PIPE).stdout)
    assert read == "b''"
    with pytest.raises(EOFError, match="EOF when reading a line"):
        ask_worker(context, lambda: input())


def test_output_of_a_users_function_is_dropped(
    serve: Callable[..., Served], run_client: RunClient
) -> None:
    served = serve("--port-base", 0)  # its output is not read until it ends
    code = """
import os, sys
from emulator.tests.user_functions import ask_worker
ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
ctx.start()

def say():
    for _ in range(10):
        print("x" * 10**6, flush=True)
        print("x" * 10**6, file=sys.stderr, flush=True)
        os.write(1, b"x" * 10**6)
        os.write(2, b"x" * 10**6)
    return "said"

print(ask_worker(ctx, say))
"""
    assert run_client(served.environment, code) == "said"
    assert served.stop() == (0, "", "")


def misdeeds() -> Iterator[Any]:
    """Yield what a user's function does to its process, and the error of its query."""

    def recurse() -> object:
        return recurse()

    def use_up_memory() -> object:
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        return len(bytearray(2**31))

    def fail_at_length() -> object:
        raise ValueError("x" * 10**7)

    def close_descriptors() -> object:
        os.closerange(3, 256)
        return time.sleep(600)

    def write_to_descriptors(data: bytes) -> object:
        for descriptor in range(3, 256):
            with contextlib.suppress(OSError):
                os.write(descriptor, data)
        return time.sleep(600)

    died = "worker process died with"
    no_answer = "worker process wrote an invalid reply"
    for name, misdeed, error, expected in (
        ("_exit", lambda: os._exit(3), RuntimeError, f"{died} exit code 3"),
        ("exit", lambda: sys.exit(3), RuntimeError, "SystemExit: 3"),
        ("segfault", lambda: ctypes.string_at(0), RuntimeError, f"{died} SIGSEGV"),
        ("abort", lambda: os.abort(), RuntimeError, f"{died} SIGABRT"),
        ("interrupt", lambda: os.kill(os.getpid(), 2), RuntimeError, "KeyboardInterrupt"),
        ("signal", lambda: os.kill(os.getpid(), 40), RuntimeError, f"{died} signal 40"),
        ("terminate", lambda: os.kill(os.getppid(), 15), RuntimeError, f"{died} SIGTERM"),
        ("kill", lambda: os.kill(os.getppid(), 9), RuntimeError, f"{died} SIGKILL"),
        ("recurse", recurse, RecursionError, "maximum recursion depth"),
        ("memory", use_up_memory, MemoryError, "^$"),
        ("long error", fail_at_length, ValueError, r"x{10000} \[... 10,000,000 characters\]"),
        ("close", close_descriptors, RuntimeError, "worker process closed its connection"),
        ("write", lambda: write_to_descriptors(b"\0\0\0\5hello"), RuntimeError, no_answer),
        ("begin", lambda: write_to_descriptors(b"\xff\0\0\0hello"), RuntimeError, no_answer),
    ):
        yield pytest.param(misdeed, error, expected, id=name)


@pytest.mark.parametrize(("misdeed", "error", "expected"), [*misdeeds()])
def test_query_whose_process_ends_fails_clearly_and_the_cluster_keeps_running(
    emulator: RunningEmulator,
    start_cluster: StartCluster,
    misdeed: Callable[[], object],
    error: type[Exception],
    expected: str,
) -> None:
    context = start_cluster()
    with pytest.raises(error, match=expected):
        ask_worker(context, misdeed)
    assert ask_worker(context, lambda: "next") == "next"
    assert emulator.state()["clusters"][0]["status"] == "Idle"


def test_function_that_forks_and_returns_gives_one_answer(start_cluster: StartCluster) -> None:
    context = start_cluster()
    assert ask_worker(context, lambda: os.fork() >= 0) == "True"
    assert ask_worker(context, lambda: "next") == "next"


def test_system_without_memory_ends_a_query_before_the_emulator(
    start_cluster: StartCluster,
) -> None:
    mine = Path("/proc/self/oom_score_adj")
    assert ask_worker(start_cluster(), mine.read_text).strip() == "1000"


def test_query_finds_nothing_of_an_earlier_one(start_cluster: StartCluster) -> None:
    def look() -> object:
        return {
            "globals": hasattr(pl, "left_here"),
            "path": sys.path,
            "variables": {**os.environ},
            "files": [os.listdir(each) for each in (".", Path.home(), tempfile.gettempdir())],
            "folder": os.getcwd(),
            "mask": os.umask(0),
            "handler": signal.getsignal(signal.SIGTERM),
            "limit": resource.getrlimit(resource.RLIMIT_NOFILE),
            "threads": threading.active_count(),
        }

    def leave() -> object:
        pl.left_here = True  # type: ignore[attr-defined]
        sys.path.append("/left-here")
        os.environ["LEFT"] = "here"
        for folder in (".", Path.home(), tempfile.gettempdir()):
            tempfile.mkstemp(dir=folder)
        os.chdir("/")
        os.umask(0o777)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500))
        threading.Thread(target=time.sleep, args=(600,)).start()
        return look()

    context = start_cluster()
    before = ask_worker(context, look)
    assert ask_worker(context, leave) != before
    assert ask_worker(context, look) == before


def worker_pids(emulator: RunningEmulator) -> list[int]:
    pids: list[int] = emulator.state()["clusters"][0]["worker_pids"]
    return pids


def test_queries_without_a_users_code_share_a_process(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    count = pl.scan_parquet("s3://your-bucket/sales/*.parquet").select(pl.len())
    remote = count.remote(start_cluster())
    remote.execute()
    first = worker_pids(emulator)
    remote.sink_parquet("s3://your-bucket/count/").await_result()
    assert worker_pids(emulator) == first


S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def with_a_users_code() -> Iterator[Any]:
    frame = pl.LazyFrame({"x": [1]})
    frames = {
        "batches": lambda: frame.map_batches(lambda batch: batch),
        "elements": lambda: frame.select(pl.col("x").map_elements(bin, return_dtype=pl.String)),
        "series": lambda: frame.select(pl.col("x").map_batches(lambda series: series)),
        "groups": lambda: frame.group_by("x").map_groups(lambda group: group, schema=None),
        "names": lambda: frame.rename(lambda name: name + "_"),
        "source": lambda: register_io_source(
            lambda *_: iter([pl.DataFrame({"x": [1]})]), schema={"x": pl.Int64}
        ),
        "credentials": lambda: pl.scan_parquet(
            "s3://your-bucket/sales/*.parquet",
            credential_provider=lambda: (
                {name.lower(): os.environ[name] for name in S3_KEYS},
                None,
            ),
        ),
    }
    for name, make in frames.items():
        yield pytest.param(make, id=name)


@pytest.mark.parametrize("make", [*with_a_users_code()])
def test_query_with_a_users_code_has_a_process_of_its_own(
    emulator: RunningEmulator, start_cluster: StartCluster, make: Callable[[], pl.LazyFrame]
) -> None:
    context = start_cluster()
    pl.LazyFrame({"x": [1]}).remote(context).execute()
    first = worker_pids(emulator)
    make().remote(context).execute()
    eventually(lambda: worker_pids(emulator) != first)


def test_two_workers_share_no_folder_and_a_stopped_cluster_leaves_none(
    start_cluster: StartCluster,
) -> None:
    def folders() -> object:
        return sorted({os.getcwd(), str(Path.home()), tempfile.gettempdir(), sys.prefix})

    first, second = start_cluster(), start_cluster()
    found = [ast.literal_eval(ask_worker(each, folders)) for each in (first, second)]
    assert not {*found[0]} & {*found[1]}
    first.stop()
    assert [[Path(each).exists() for each in one] for one in found] == [
        [False] * len(found[0]),
        [True] * len(found[1]),
    ]
    second.stop()
