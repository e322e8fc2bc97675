"""Run Airflow with scheduler, triggerer and UI, on an emulator, until Ctrl-C."""

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
"""Seconds to wait for a component to stop before it and its tasks are killed."""


def settings(port: int) -> dict[str, str]:
    """Return Airflow's settings for one user on this machine."""
    url = f"http://{HOST}:{port}"
    return {
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        # Run every DAG once by itself: that costs nothing on the emulator.
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        # SQLite allows one writer at a time, and waiting writers time out after some seconds.
        "AIRFLOW__CORE__PARALLELISM": "4",
        # The default may query a name server.
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "socket.gethostname",
    }


@contextlib.contextmanager
def airflow(*commands: str, log: IO[str]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run `airflow` commands while the context is open, then stop them and all their children."""
    processes = {
        command: subprocess.Popen(
            [sys.executable, "-m", "airflow", *command.split()],
            stdout=log,
            stderr=log,
            # Keeps the terminal's Ctrl-C away, and marks all descendants of this process.
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
    """Return the status of each component from the API server; empty until it answers."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/api/v2/monitor/health") as answer:
            return {component: each["status"] for component, each in json.load(answer).items()}
    except urllib.error.URLError:
        return {}


def get_token(port: int) -> str:
    """Return a token for Airflow's REST API. Only Airflow 3.3 needs none."""
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
        `stop` is set, or a component has exited by itself.
    """
    while not condition():
        if stop.wait(0.2):
            sys.exit()
        for command, process in components.items():
            if process.poll() is not None:
                sys.exit(f"'airflow {command}' exited by itself: Airflow's log shows why")


def main(home: Path, port: int) -> None:
    """Run until SIGINT, SIGTERM or SIGHUP.

    Parameters
    ----------
    home
        AIRFLOW_HOME, with runs, logs and the emulator's data.
    port
        Port of the UI.

    Raises
    ------
    SystemExit
        The port is taken, or a component of Airflow exited by itself.
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
        print(f"Airflow's log: {log.name}\nEmulator: {emulator.rest_url}", flush=True)
        with airflow("db migrate", log=log) as commands:
            [migration] = commands.values()
            wait_until(lambda: migration.poll() is not None, {}, stop)
        if migration.returncode:
            sys.exit("'airflow db migrate' failed: Airflow's log shows why")

        # Skip the log servers: they listen on every interface, and the logs are on this disk.
        with (
            airflow("api-server", log=log) as api_server,
            airflow("dag-processor", "triggerer --skip-serve-logs", log=log) as others,
        ):
            components = api_server | others
            wait_until(lambda: health(port), components, stop)
            # The scheduler starts last and stops first: its tasks report to the API server.
            with airflow("scheduler --skip-serve-logs", log=log) as scheduler:
                components |= scheduler
                wait_until(lambda: set(health(port).values()) == {"healthy"}, components, stop)
                print(f"Airflow runs until Ctrl-C: http://{HOST}:{port}", flush=True)
                wait_until(lambda: False, components, stop)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=ROOT / ".airflow" / "standalone")
    parser.add_argument("--port", type=int, required=True)
    main(**vars(parser.parse_args()))
