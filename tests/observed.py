"""What a test sees of Polars Cloud and of the record."""

import json
from typing import Any

from airflow.models import Variable
from airflow.utils.session import create_session
from sqlalchemy import select

from polars_cloud_emulator.testing import RunningEmulator
from tests.tries import Supervisor


def query_statuses(emulator: RunningEmulator) -> list[str]:
    """Of all queries, oldest first."""
    return [query["status"] for query in emulator.state()["queries"]]


def cluster_statuses(emulator: RunningEmulator) -> list[str]:
    """Of all clusters, oldest first."""
    return [cluster["status"] for cluster in emulator.state()["clusters"]]


def calls(emulator: RunningEmulator, name: str) -> int:
    """How often Polars Cloud got the call whose path ends in this name."""
    return sum(entry["path"].endswith(f"/{name}") for entry in emulator.journal())


def entries(supervisor: Supervisor, kind: str) -> list[dict[str, Any]]:
    """The record's entries for a `task` or a `cluster`."""
    return [
        json.loads(value)
        for key, value in sorted(supervisor.variables.items())
        if key.startswith(f"polars_cloud/{kind}/")
    ]


def variables() -> list[str]:
    """Keys of the Variables in Airflow's database: what is still on record as in use."""
    with create_session() as session:
        return list(session.scalars(select(Variable.key)))  # noqa: AIR311
