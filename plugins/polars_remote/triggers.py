"""Former path of the triggers, for tasks that were deferred before an upgrade."""

from typing import Any

from .waiting import triggers


def _rename(arguments: dict[str, Any]) -> dict[str, Any]:
    names = {"fires_from": "not_before", "hand_back_at": "resume_at"}
    return {names.get(name, name): value for name, value in arguments.items()}


class QueryTrigger(triggers.QueryTrigger):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**_rename(arguments))


class ClusterTrigger(triggers.ClusterTrigger):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**_rename(arguments))
