"""States without an emulator, with a clock that the test sets."""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.jobs import Outcome
from polars_cloud_emulator.model.queries import Query
from polars_cloud_emulator.model.specs import ClusterSpec, Specs, Version
from polars_cloud_emulator.model.state import State

OUTCOME = Outcome(destinations=["s3://x"], file_type="parquet", n_rows=1, head=None)
MINUTE = timedelta(minutes=1)


class StoppedClock(Clock):
    """A clock that advances only on request."""

    def __init__(self) -> None:
        super().__init__()
        self._start = super().now()

    def now(self) -> datetime:
        return self._start + self._ahead


def new_state(clock: Clock) -> State:
    return State(clock, python_version="3.11.7", polars_version="2.0.0")


def spec(**changed: Any) -> ClusterSpec:
    values: dict[str, Any] = {
        "cluster_size": 2,
        "mode": "Direct",
        "python_version": Version(3, 11, 7),
        "polars_version": "2.0.0",
        "specs": Specs(2, 4),
    }
    return ClusterSpec(**values | changed)


def submit(state: State, cluster_id: UUID, **changed: Any) -> Query:
    values: dict[str, Any] = {
        "query_id": uuid4(),
        "output_location": None,
        "distributed": False,
        "engine": "streaming",
        "optimization_flags": None,
        "priority": 0,
        "labels": [],
        "user": None,
    }
    return state.submit(cluster_id, **values | changed)
