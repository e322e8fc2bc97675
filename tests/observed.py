"""State of Polars Cloud and of the record, as a test reads it."""

import json
from typing import Any

from airflow.models import Variable
from airflow.utils.session import create_session
from sqlalchemy import select

from polars_cloud_emulator.testing import RunningEmulator
from tests.tries import Supervisor


def query_statuses(emulator: RunningEmulator) -> list[str]:
    """Return the statuses of all queries, oldest first."""
    return [query["status"] for query in emulator.state()["queries"]]


def cluster_statuses(emulator: RunningEmulator) -> list[str]:
    """Return the statuses of all clusters, oldest first."""
    return [cluster["status"] for cluster in emulator.state()["clusters"]]


def calls(emulator: RunningEmulator, name: str) -> int:
    """Count the calls whose path ends in this name."""
    return sum(entry["path"].endswith(f"/{name}") for entry in emulator.journal())


def entries(supervisor: Supervisor, kind: str) -> list[dict[str, Any]]:
    """Return the record's entries of kind `task` or `cluster`."""
    return [
        json.loads(value)
        for key, value in sorted(supervisor.variables.items())
        if key.startswith(f"polars_cloud/{kind}/")
    ]


def variables() -> list[str]:
    """Return the record's Variable keys in Airflow's database."""
    with create_session() as session:
        return list(session.scalars(select(Variable.key)))  # noqa: AIR311
