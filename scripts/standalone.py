"""Run Airflow as it is deployed, with scheduler and UI, against an emulator until Ctrl-C."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil

from local_airflow import ROOT, use_airflow, use_emulator
from polars_cloud_emulator.testing import running_emulator

HOST = "127.0.0.1"
STOP_TIMEOUT = 10.0
"""Seconds until a component that does not stop is killed, with the tasks that it runs."""


def settings(port: int) -> dict[str, str]:
    """Airflow's variables for one user on this machine."""
    url = f"http://{HOST}:{port}"
    return {
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        # Every DAG runs once by itself: against the emulator that costs nothing.
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        # SQLite takes one writer at a time, and those who wait give up after some seconds.
        "AIRFLOW__CORE__PARALLELISM": "4",
        # The default may ask a name server.
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "socket.gethostname",
    }


@contextlib.contextmanager
def airflow(*commands: str, log: IO[str]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run `airflow` commands side by side, with all that they start, while the context is open."""
    processes = {
        command: subprocess.Popen(
            [sys.executable, "-m", "airflow", *command.split()],
            stdout=log,
            stderr=log,
            # Keeps the terminal's Ctrl-C away, and tells what descends from this process.
            start_new_session=True,
        )
        for command in commands
    }
    try:
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT)
        sessions = {process.pid for process in processes.values()}
        for left in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(left.pid) in sessions:
                    left.kill()
        for process in processes.values():
            process.wait()


def health(port: int) -> dict[str, str]:
    """The status of every component as the API server sees it; empty until it answers."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/api/v2/monitor/health") as answer:
            return {component: it["status"] for component, it in json.load(answer).items()}
    except urllib.error.URLError:
        return {}


def get_token(port: int) -> str:
    """A token for Airflow's REST API, which only Airflow 3.3 does without."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/auth/token") as answer:
        return str(json.load(answer)["access_token"])


def wait_until(
    condition: Callable[[], object],
    components: dict[str, subprocess.Popen[bytes]],
    stop: threading.Event,
) -> None:
    """Wait for the condition.

    Raises
    ------
    SystemExit
        It is time to stop, or a component has ended by itself.
    """
    while not condition():
        if stop.wait(0.2):
            sys.exit()
        for command, process in components.items():
            if process.poll() is not None:
                sys.exit(f"'airflow {command}' ended by itself: the log says why")


def main(home: Path, port: int) -> None:
    """Run until SIGINT, SIGTERM or SIGHUP.

    Parameters
    ----------
    home
        AIRFLOW_HOME, where runs, logs and the emulator's data are kept.
    port
        Where the UI is served.

    Raises
    ------
    SystemExit
        The port is taken, or a part of Airflow ended by itself.
    """
    try:
        socket.create_server((HOST, port)).close()
    except (OSError, OverflowError) as error:
        sys.exit(f"Airflow cannot listen on port {port} ({error}): try 'make airflow PORT=8081'")

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())

    home.mkdir(parents=True, exist_ok=True)
    use_airflow(home)
    os.environ |= settings(port)
    with (
        running_emulator(home / "emulator") as emulator,
        (home / "standalone.log").open("w") as log,
    ):
        use_emulator(emulator.environment)
        print(f"Emulator at {emulator.rest_url}, Airflow's log in {log.name}", flush=True)
        with airflow("db migrate", log=log) as commands:
            [migration] = commands.values()
            wait_until(lambda: migration.poll() is not None, {}, stop)
        if migration.returncode:
            sys.exit("'airflow db migrate' failed: the log says why")

        # Without log servers: they would listen on every interface, and the logs are on this disk.
        with (
            airflow("api-server", log=log) as api_server,
            airflow("dag-processor", "triggerer --skip-serve-logs", log=log) as others,
        ):
            components = api_server | others
            wait_until(lambda: health(port), components, stop)
            # Only now, as its tasks report to the API server; it stops first, and waits for them.
            with airflow("scheduler --skip-serve-logs", log=log) as scheduler:
                components |= scheduler
                wait_until(lambda: set(health(port).values()) == {"healthy"}, components, stop)
                print(f"Airflow at http://{HOST}:{port}, until Ctrl-C", flush=True)
                wait_until(lambda: False, components, stop)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=ROOT / ".airflow" / "standalone")
    parser.add_argument("--port", type=int, required=True)
    main(**vars(parser.parse_args()))
