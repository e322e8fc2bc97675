"""Supported Airflow versions, and names that differ between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow import __version__

OLDEST = (3, 1)
VERSION = tuple(int(part) for part in __version__.split(".")[:2])

if VERSION < OLDEST:
    raise ImportError(
        f"This is Airflow {__version__}. DAGs that use Polars Cloud need Airflow "
        f"{'.'.join(map(str, OLDEST))} or newer: upgrade Airflow"
    )

LISTS_VARIABLES = VERSION >= (3, 3)
"""Whether Airflow can list Variables by the prefix of their keys."""

CALLS_ON_KILL = VERSION >= (3, 3)
"""Whether Airflow calls a trigger's `on_kill` when a user ends its task. Airflow 3.2 only cancels
the trigger, as it also does when the triggerer stops."""

TRIGGERS_CAN_CALL_AIRFLOW = VERSION >= (3, 2)
"""Whether a thread of the triggerer can call Airflow. On Airflow 3.1, such a thread reads replies
that are meant for other triggers, and the triggerer exits."""

COUNTS_CLEARED_TASKS = VERSION >= (3, 2)
"""Whether clearing a task of an unfinished run raises the run's `clear_number`."""

if TYPE_CHECKING or VERSION >= (3, 2):
    from airflow.sdk.exceptions import (
        AirflowFailException,
        AirflowNotFoundException,
        AirflowTaskTimeout,
        TaskDeferred,
    )
else:
    from airflow.exceptions import (
        AirflowFailException,
        AirflowNotFoundException,
        AirflowTaskTimeout,
        TaskDeferred,
    )


def to_json(value: Any) -> Any:
    """Return the value as Airflow stores it in an XCom."""
    if TYPE_CHECKING or VERSION >= (3, 2):
        from airflow.sdk.serde import serialize
    else:
        from airflow.serialization.serde import serialize
    return serialize(value)


def from_json(value: Any) -> Any:
    """Return the value that `to_json` was called with."""
    if TYPE_CHECKING or VERSION >= (3, 2):
        from airflow.sdk.serde import deserialize
    else:
        from airflow.serialization.serde import deserialize
    return deserialize(value)


__all__ = [
    "CALLS_ON_KILL",
    "COUNTS_CLEARED_TASKS",
    "LISTS_VARIABLES",
    "TRIGGERS_CAN_CALL_AIRFLOW",
    "AirflowFailException",
    "AirflowNotFoundException",
    "AirflowTaskTimeout",
    "TaskDeferred",
    "from_json",
    "to_json",
]
