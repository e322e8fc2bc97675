"""``python -m polars_cloud_emulator serve``: start, stop and restart."""

import contextlib
import os
import random
import signal
import socket
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest

from emulator.tests.blocking_query import BlockingQuery
from emulator.tests.command_line import Served, command
from emulator.tests.processes import descendants, none_running
from emulator.tests.raw_calls import access_token, rest_client, tls_client
from emulator.tests.s3_calls import s3_client
from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.env_file import read_env_file, write_env_file
from polars_cloud_emulator.server import Emulator
from polars_cloud_emulator.storage.object_store import ObjectStore
from polars_cloud_emulator.testing import RunningEmulator, eventually

RunClient = Callable[..., str]
SUBMIT = """
from pathlib import Path
from emulator.tests.blocking_query import BlockingQuery
for _ in range(2):
    ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    ctx.start()
blocking = BlockingQuery(Path("{directory}"))
query = blocking.lazy_frame().remote(ctx).sink_parquet("s3://your-bucket/mine/")
"""


@pytest.fixture
def port_base() -> int:
    """Return the first of three consecutive free ports, below the ephemeral ports of the system."""
    while True:
        base = random.randrange(10_000, 32_000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(base, base + 3):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return base


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_emulator_and_every_process_in_the_middle_of_a_query(
    serve: Callable[..., Served], run_client: RunClient, blocking: BlockingQuery, number: int
) -> None:
    served = serve("--port-base", 0)
    run_client(served.environment, SUBMIT.format(directory=blocking.directory))
    blocking.wait_for_start()
    processes = descendants(served.pid)
    assert len(processes) >= 2
    assert served.stop(number) == (0, "", "")
    assert none_running(processes)


def test_emulator_that_is_killed_leaves_no_worker_behind(
    serve: Callable[..., Served], run_client: RunClient, blocking: BlockingQuery
) -> None:
    served = serve("--port-base", 0)
    run_client(served.environment, SUBMIT.format(directory=blocking.directory))
    blocking.wait_for_start()
    processes = descendants(served.pid)
    assert len(processes) >= 2
    served.stop(signal.SIGKILL)
    eventually(lambda: none_running(processes))


def test_open_connection_of_a_client_does_not_delay_the_end(
    serve: Callable[..., Served],
) -> None:
    served = serve("--port-base", 0)
    with tls_client(served.environment) as tls, rest_client(served.environment) as rest:
        assert tls.get("/nothing").status_code == rest.get("/nothing").status_code == 501
        served.process.send_signal(signal.SIGTERM)
        # An asyncio server would wait 30 s for a TLS shutdown that does not come.
        _, errors = served.process.communicate(timeout=15)
    assert errors == ""


def test_client_that_sends_on_while_the_emulator_ends_leaves_no_traceback(
    serve: Callable[..., Served],
) -> None:
    served = serve("--port-base", 0)
    host, _, port = served.environment["POLARS_CLOUD_DOMAIN"].partition("@")[2].partition(":")
    [authority] = Path(served.environment["SSL_CERT_DIR"]).iterdir()
    context = ssl.create_default_context(cafile=str(authority))
    sending = threading.Event()

    def send() -> None:
        connection = socket.create_connection((host, int(port)))
        with context.wrap_socket(connection, server_hostname=host) as tls:
            tls.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000000\r\n\r\n")
            with contextlib.suppress(OSError):
                while True:
                    tls.sendall(b"x" * 1000)
                    sending.set()

    with ThreadPoolExecutor() as clients:
        for _ in range(4):
            clients.submit(send)
        assert sending.wait(30)
        assert served.stop() == (0, "", "")


def test_ready_means_that_everything_listens_on_loopback_alone(
    serve: Callable[..., Served], port_base: int
) -> None:
    served = serve("--port-base", port_base)
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.Process(served.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", port_base + n) for n in range(3)}
    assert served.rest_url == f"http://127.0.0.1:{port_base}"
    assert access_token(served.environment)


def test_env_file_has_every_variable_and_only_its_owner_reads_it(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    env_file = tmp_path / "env"
    env_file.touch(mode=0o644)
    environment = serve("--port-base", 0).environment
    assert env_file.stat().st_mode & 0o777 == 0o600
    assert set(environment) == {
        "POLARS_CLOUD_API_ADDR",
        "POLARS_CLOUD_DOMAIN",
        "POLARS_CLOUD_PORTAL",
        "POLARS_CLOUD_CONFIG_DIR",
        "POLARS_CLOUD_CLIENT_ID",
        "POLARS_CLOUD_CLIENT_SECRET",
        "AIRFLOW_CONN_POLARS_CLOUD",
        "SSL_CERT_DIR",
        "NO_PROXY",
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    }


def test_env_file_reads_the_same_in_a_shell_and_here(tmp_path: Path) -> None:
    environment = {"A": "two words", "B": 'it\'s "quoted" $HOME `x` \\', "C": ""}
    path = tmp_path / "a directory" / "env"
    write_env_file(path, environment)
    assert read_env_file(path) == environment
    script = 'set -a; . "$0"; printf "%s\\n" "$A" "$B" "$C"'
    shell = subprocess.run(["sh", "-c", script, path], capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines() == list(environment.values())


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_port_in_use_is_reported_in_one_sentence(port_base: int, taken: int) -> None:
    with socket.create_server(("127.0.0.1", port_base + taken)):
        ran = subprocess.run(
            command("--port-base", port_base), capture_output=True, text=True, timeout=60
        )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert len(ran.stderr.splitlines()) == 1
    assert "Address already in use" in ran.stderr
    assert str(port_base + taken) in ran.stderr
    assert "is another emulator running? choose other ports with --port-base" in ran.stderr


def test_wait_survives_a_restart_of_the_emulator(
    serve: Callable[..., Served],
    run_client: RunClient,
    port_base: int,
    blocking: BlockingQuery,
    tmp_path: Path,
) -> None:
    options = ("--port-base", port_base, "--state-dir", tmp_path / "state")
    first = serve(*options)
    code = SUBMIT.format(directory=blocking.directory) + "print(query.await_result().n_rows_total)"
    with ThreadPoolExecutor() as background:
        waiting = background.submit(run_client, first.environment, code)
        try:
            blocking.wait_for_start()
            before = first.state()
            assert first.stop() == (0, "", "")
            second = serve(*options)
            assert second.environment == first.environment
            assert not waiting.done()
        finally:
            blocking.release()
        assert waiting.result() == "3"
    assert ids(second.state()) == ids(before)
    assert second.state()["queries"][0]["status"] == "Success"


def ids(state: dict[str, Any]) -> list[str]:
    return [item["id"] for kind in ("clusters", "queries") for item in state[kind]]


def test_second_start_in_a_state_directory_keeps_secret_trust_and_data(
    serve: Callable[..., Served], run_client: RunClient, tmp_path: Path
) -> None:
    options = ("--port-base", 0, "--state-dir", tmp_path / "state")
    first = serve(*options)
    token = access_token(first.environment)
    write = """
ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
ctx.register("airflow-production")
remote = pl.LazyFrame({"x": [1, 2]}).remote(ctx)
remote.sink_parquet("s3://your-bucket/mine/").await_result()
ctx.stop()
"""
    run_client(first.environment, write)
    before = first.state()
    assert first.stop() == (0, "", "")
    assert os.stat(tmp_path / "state").st_mode & 0o777 == 0o700

    second = serve(*options)
    [authority] = Path(first.environment["SSL_CERT_DIR"]).iterdir()
    assert Path(second.environment["SSL_CERT_DIR"]) == authority.parent
    secret = "POLARS_CLOUD_CLIENT_SECRET"
    assert second.environment[secret] == first.environment[secret]
    assert access_token(second.environment)
    with rest_client(second.environment) as rest:
        rest.headers["authorization"] = f"Bearer {token}"
        assert rest.get("/api/v1/user/me").status_code == 200
    assert second.state() == before
    read = 'print(pl.read_parquet("s3://your-bucket/mine/")["x"].to_list())'
    assert run_client(second.environment, read) == "[1, 2]"


def test_sample_data_covers_the_day_of_a_later_start_and_every_day_after_it(
    tmp_path: Path,
) -> None:
    clock = Clock()
    for _ in range(2):
        clock.advance(timedelta(days=40))
        with Emulator(clock=clock, state_dir=tmp_path / "state") as emulator:
            assert last_day_of_returns(emulator) == clock.now().date() + timedelta(days=1)
            clock.advance(timedelta(days=40))
            tomorrow = clock.now().date() + timedelta(days=1)
            # `returns` is written last; a file that is being replaced has no last day.
            eventually(partial(object_exists, emulator, f"returns/{tomorrow:%Y-%m}.parquet"))
            assert last_day_of_returns(emulator) == tomorrow


def test_reset_comes_after_the_sample_data_of_another_day(
    emulator_here: Callable[..., RunningEmulator], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    emulator = emulator_here(clock=clock)
    today, later = (clock.now().date() + timedelta(days=days) for days in (1, 41))
    begun, reset_was_faster = threading.Event(), threading.Event()
    written: list[date] = []
    write = ObjectStore.write_sample_data

    def write_slowly(store: ObjectStore, last_day: date) -> None:
        if last_day == later:
            begun.set()
            reset_was_faster.wait(1)  # enough time on a busy machine
        write(store, last_day)
        written.append(last_day)
        reset_was_faster.set()

    monkeypatch.setattr(ObjectStore, "write_sample_data", write_slowly)
    clock.advance(timedelta(days=40))
    assert begun.wait(60)
    emulator.reset()
    assert written == [later, today]
    assert last_day_of_returns(emulator) == today


def test_data_of_a_new_day_is_there_when_the_clock_has_been_advanced(
    emulator: RunningEmulator,
) -> None:
    now = emulator.advance_clock(timedelta(days=40))
    assert last_day_of_returns(emulator) == now.date() + timedelta(days=1)


def object_exists(emulator: Emulator, key: str) -> bool:
    listed = s3_client(emulator.environment).list_objects_v2(Bucket="your-bucket", Prefix=key)
    return bool(listed["KeyCount"])


def last_day_of_returns(emulator: Emulator | RunningEmulator) -> date:
    options = {
        name.lower(): value
        for name, value in emulator.environment.items()
        if name.startswith("AWS_")
    }
    returns = pl.scan_parquet("s3://your-bucket/returns/", storage_options=options)
    day: date = returns.select(pl.max("date")).collect().item()
    return day


def test_variables_of_the_users_own_s3_and_proxy_are_ignored(
    serve: Callable[..., Served], run_client: RunClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_PROFILE", "unknown")
    served = serve("--port-base", 0)
    for name in ("HTTP_PROXY", "http_proxy", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name)
    query = """
ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
print(pl.scan_parquet("s3://your-bucket/returns/").select(pl.len()).remote(ctx).execute().status)
"""
    assert run_client(served.environment, query) == "QueryStatus.SUCCESS"


def test_host_may_be_a_name(serve: Callable[..., Served], run_client: RunClient) -> None:
    served = serve("--port-base", 0, "--host", "localhost")
    assert served.rest_url.startswith("http://localhost:")
    query = """
ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
print(pl.scan_parquet("s3://your-bucket/returns/").select(pl.len()).remote(ctx).execute().status)
"""
    assert run_client(served.environment, query) == "QueryStatus.SUCCESS"


def test_impossible_port_is_reported() -> None:
    ran = subprocess.run(command("--port-base", 70000), capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "--port-base 70000" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("what", ["no database", "another's content"])
def test_unreadable_state_is_reported(what: str, tmp_path: Path) -> None:
    if what == "no database":
        (tmp_path / "state.sqlite").write_text("{" * 1000)
    else:
        with contextlib.closing(sqlite3.connect(tmp_path / "state.sqlite")) as file, file:
            file.execute("CREATE TABLE kept (kind TEXT, key TEXT, content BLOB)")
            file.execute("INSERT INTO kept VALUES ('query', '1', 'x')")
    ran = subprocess.run(
        command("--port-base", 0, "--state-dir", tmp_path),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert str(tmp_path / "state.sqlite") in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
