"""Report the services that are starting, then print the addresses and the login."""

import contextlib
import json
import os
import socket
import time
import urllib.request
from collections.abc import Set
from http.client import HTTPException
from pathlib import Path
from typing import Any

POLL_SECONDS = 1.0
REMINDER_SECONDS = 30.0
"""Interval at which to name the services that are still starting."""
AIRFLOW = {
    "api-server": "metadatabase",
    "scheduler": "scheduler",
    "dag-processor": "dag_processor",
    "triggerer": "triggerer",
}
"""Services of Airflow, and their names in the API server's answer."""
# Without the environment's proxy, because it cannot reach containers.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str) -> dict[str, Any]:
    """Return a JSON answer; empty while the server does not answer."""
    try:
        with OPENER.open(url, timeout=15) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except (OSError, HTTPException, ValueError):  # also in the middle of an answer
        return {}


def find_up(starting: Set[str]) -> set[str]:
    """Return the services that have come up."""
    up = set()
    if "postgres" in starting:
        with contextlib.suppress(OSError), socket.create_connection(("postgres", 5432), timeout=15):
            up.add("postgres")
    if "emulator" in starting and get("http://emulator:7410/_emulator/health"):
        up.add("emulator")
    # The API server reads every service's last heartbeat from the database.
    health = get("http://api-server:8080/api/v2/monitor/health")
    healthy = {part for part, state in health.items() if state["status"] == "healthy"}
    up |= {service for service, part in AIRFLOW.items() if part in healthy}
    return up & starting


def wait_for(services: list[str]) -> None:
    """Print each service when it is up, and twice a minute those that are not."""
    start = time.monotonic()
    next_reminder = REMINDER_SECONDS
    starting = set(services)
    while starting:
        up = find_up(starting)
        starting -= up
        seconds = time.monotonic() - start
        for service in sorted(up):
            print(f"{seconds:3.0f} s: {service} is up")
        if starting and seconds >= next_reminder:
            next_reminder = seconds + REMINDER_SECONDS
            names = [service for service in services if service in starting]
            print(
                f"{seconds:3.0f} s: still starting: {', '.join(names)}. To see why: "
                f"docker compose logs {' '.join(names)}"
            )
        time.sleep(POLL_SECONDS)


def main() -> None:
    emulated = os.environ["POLARS_CLOUD_EMULATOR"] == "1"
    airflow = f"http://127.0.0.1:{os.environ['AIRFLOW_PORT']}"
    clusters = f"http://127.0.0.1:{os.environ['POLARS_CLOUD_EMULATOR_PORT']}"
    print("Airflow is starting. This takes 1 to 2 minutes; on a busy machine, more.")
    wait_for(["postgres", *(["emulator"] if emulated else []), *AIRFLOW])

    print(f"Airflow: {airflow}")
    for user, password in json.loads(Path("/keys/login.json").read_text()).items():
        print(f"Login: {user} / {password}")
    if emulated:
        print(f"Clusters: {clusters}")
    match os.environ["POLARS_CLOUD_EMULATOR"], os.environ["POLARS_CLOUD_EMULATOR_OBJECT_STORE"]:
        case "1", "emulator":
            polars_cloud = "the emulator. Each DAG but preflight runs once by itself."
        case "1", _:
            polars_cloud = (
                "the emulator, with your bucket. All DAGs are paused: their queries write there."
            )
        case _:
            polars_cloud = (
                "your account. All DAGs are paused: each run except of preflight is billed."
            )
    print(f"Polars Cloud: {polars_cloud}")


if __name__ == "__main__":
    main()
