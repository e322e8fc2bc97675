"""The pending faults."""

import asyncio
import re
from collections.abc import Sequence
from typing import get_args

import msgspec
from starlette.routing import Match, Route
from starlette.types import Scope

from polars_cloud_emulator.faults.kinds import AnyFault, CredentialsRevoked, Fault
from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.protocol.access_tokens import AccessTokens


class Faults:
    """The pending faults, in the order in which they were added."""

    def __init__(self, routes: Sequence[Route], access_tokens: AccessTokens) -> None:
        self._routes = routes
        self._access_tokens = access_tokens
        self.pending: list[Fault] = []
        self.cleared = asyncio.Event()

    def add(self, body: bytes) -> None:
        """Add a fault from a JSON object.

        Raises
        ------
        InvalidRequest
            The object is not a fault, or its kind does not support the operation. The message
            lists the kinds or the operations.
        """
        try:
            fault = msgspec.json.decode(body, type=AnyFault)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            kinds = map(_describe, get_args(AnyFault))
            raise InvalidRequest(
                f"{error}. A fault has operation, kind, nth (default 1), times (default 1) and "
                f"the fields of its kind; the kinds are {', '.join(kinds)}"
            ) from None
        operations = {
            operation_of(route, method)
            for route in self._routes
            for method in (route.methods or set()) - {"HEAD"}
        }
        fitting = sorted(o for o in operations if re.fullmatch(fault.operations, o))
        if fault.operation not in fitting:
            problem = "incompatible with" if fault.operation in operations else "for the unknown"
            raise InvalidRequest(
                f"{_describe(type(fault))} is {problem} operation '{fault.operation}'; "
                f"its operations are {', '.join(fitting)}"
            )
        self.pending.append(fault)

    def clear(self) -> None:
        """Remove all pending faults, accept client secrets again, and release stalled calls."""
        self.pending.clear()
        self._access_tokens.revoked = False
        self.cleared.set()
        self.cleared = asyncio.Event()

    def due(self, scope: Scope) -> Fault | None:
        """Return the fault for this call: at most one; the others wait for the next call."""
        routes = (route for route in self._routes if route.matches(scope)[0] is Match.FULL)
        operation = next((operation_of(route, scope["method"]) for route in routes), None)
        due = None
        for fault in [fault for fault in self.pending if fault.operation == operation]:
            if fault.nth > 1:
                fault.nth -= 1
            elif due is None:
                due = fault
        if due is not None and not isinstance(due, CredentialsRevoked):
            due.times -= 1
            if due.times == 0:
                self.pending.remove(due)
        return due


def operation_of(route: Route, method: str) -> str:
    """Return the method of a gRPC service, or a REST call such as ``GET compute/{id}``."""
    service, _, name = route.path.rpartition("/")
    if service.endswith(".ClientService"):
        return name
    short = re.sub(r"^/(api/v1/(workspace/{\w+:uuid}/)?|realms/.*/)", "", route.path)
    return f"{method} {re.sub(r'{[^}]+}', '{id}', short)}"


def _describe(kind: type[Fault]) -> str:
    own = [name for name in kind.__struct_fields__ if name not in Fault.__struct_fields__]
    return f"{kind.__struct_config__.tag} ({', '.join(own) or 'no fields'})"
