"""What goes wrong on request: the pending faults, and the door at which calls meet them."""

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Coroutine, Sequence
from contextvars import ContextVar
from typing import Annotated, ClassVar, cast, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polars_cloud_emulator.access_tokens import AccessTokens
from polars_cloud_emulator.errors import EmulatorError, GrpcStatus, InvalidRequest
from polars_cloud_emulator.grpc_transport import GrpcResponse
from polars_cloud_emulator.rest_transport import refusal

REST_CALLS = r"\w+ .+"
GRPC_CALLS = r"\w+"
SUBMIT = "SubmitQuery"
STARTS = r"POST (compute|manifest)/start"

Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


def _snake_case(name: str) -> str:
    return re.sub(r"\B(?=[A-Z])", "_", name).lower()


class Fault(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag=_snake_case
):
    """Fires from the ``nth`` call of ``operation`` from now on, ``times`` times."""

    operations: ClassVar[str] = ".+"
    """Pattern of the operations that it fits."""

    operation: str
    nth: Count = 1
    times: Count = 1


class HttpError(Fault):
    """In the service's own form, or without a message as a gateway in front of it answers."""

    operations = REST_CALLS
    status: Annotated[int, msgspec.Meta(ge=400, le=599)]
    message: str | None = None


class GrpcError(Fault):
    operations = GRPC_CALLS
    code: str
    message: str

    def __post_init__(self) -> None:
        known = [status.name for status in GrpcStatus if status is not GrpcStatus.OK]
        if self.code not in known:
            raise ValueError(f"unknown code '{self.code}', known are {', '.join(known)}")


class ConnectionReset(Fault):
    """Nothing is done."""


class AnswerLost(Fault):
    """The call is carried out, and its connection reset in place of the answer."""


class Delay(Fault):
    """Seconds on the wall until the call is carried out."""

    seconds: Seconds


class Stall(Fault):
    """Nothing is done, nor answered; the connection is reset when the faults are cleared."""


class TokensExpire(Fault):
    """With this call, every token handed out so far."""


class CredentialsRevoked(Fault):
    """The same, and there are no new ones. The only fault that lasts until it is cleared."""


class QueryFails(Fault):
    operations = SUBMIT
    error: Annotated[str, msgspec.Meta(pattern=r"^\w+: ")]
    """``Type: text``, from which the client makes the exception."""


class QueryHangs(Fault):
    """Holds its workers until it is canceled or the cluster stops."""

    operations = SUBMIT


class QueryTakes(Fault):
    """Holds its workers for seconds of the emulator's clock before it is carried out."""

    operations = SUBMIT
    seconds: Seconds


class QueryWaits(Fault):
    """Is scheduled, and holds no worker, for seconds of the emulator's clock."""

    operations = SUBMIT
    seconds: Seconds


class WorkerKilled(Fault):
    """SIGKILL for the process that runs the query."""

    operations = SUBMIT


class ClusterLost(Fault):
    """The cluster fails while it runs the query."""

    operations = SUBMIT
    message: str


class StartupFails(Fault):
    operations = STARTS
    message: str


class StartupTakes(Fault):
    """Seconds of the emulator's clock until the cluster takes queries."""

    operations = STARTS
    seconds: Seconds


QueryFault = QueryFails | QueryHangs | QueryTakes | QueryWaits | WorkerKilled | ClusterLost
StartupFault = StartupFails | StartupTakes
AnyFault = (
    HttpError
    | GrpcError
    | ConnectionReset
    | AnswerLost
    | Delay
    | Stall
    | TokensExpire
    | CredentialsRevoked
    | QueryFault
    | StartupFault
)


class Faults:
    """The faults that are still to come, first posted first."""

    def __init__(self, routes: Sequence[Route], access_tokens: AccessTokens) -> None:
        self._routes = routes
        self._access_tokens = access_tokens
        self.pending: list[Fault] = []
        self.cleared = asyncio.Event()

    def add(self, body: bytes) -> None:
        """Add the fault that a JSON object describes.

        Raises
        ------
        InvalidRequest
            It is none, or fits no operation; with what is known.
        """
        try:
            fault = msgspec.json.decode(body, type=AnyFault)
        except msgspec.DecodeError as error:
            kinds = map(_described, get_args(AnyFault))
            raise InvalidRequest(
                f"{error}. A fault has operation, kind, nth (1 unless given), times (1 unless "
                f"given) and its kind's fields; the kinds are {', '.join(kinds)}"
            ) from None
        operations = {
            operation_of(route, method)
            for route in self._routes
            for method in (route.methods or set()) - {"HEAD"}
        }
        fitting = sorted(o for o in operations if re.fullmatch(fault.operations, o))
        if fault.operation not in fitting:
            problem = "does not fit" if fault.operation in operations else "needs an operation, not"
            raise InvalidRequest(
                f"{_described(type(fault))} {problem} '{fault.operation}'; "
                f"it fits {', '.join(fitting)}"
            )
        self.pending.append(fault)

    def clear(self) -> None:
        """Forget what is still to come, end what lasts, and let go the calls that are held."""
        self.pending.clear()
        self._access_tokens.revoked = False
        self.cleared.set()
        self.cleared = asyncio.Event()

    def due(self, scope: Scope) -> Fault | None:
        """The fault that this call meets: one at most, the others wait for the next call."""
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
    """The method of a gRPC service, or a REST call such as ``GET compute/{id}``."""
    service, _, name = route.path.rpartition("/")
    if service.endswith(".ClientService"):
        return name
    short = re.sub(r"^/(api/v1/(workspace/{\w+:uuid}/)?|realms/.*/)", "", route.path)
    return f"{method} {re.sub(r'{[^}]+}', '{id}', short)}"


def _described(kind: type[Fault]) -> str:
    own = [name for name in kind.__struct_fields__ if name not in Fault.__struct_fields__]
    return f"{kind.__struct_config__.tag} ({', '.join(own) or 'no fields'})"


class FaultMiddleware:
    """Lets a call in, unless the fault that it meets keeps it out.

    What is to go wrong behind the door, with a query or a start-up, goes in as
    ``scope["fault"]``.
    """

    def __init__(self, app: ASGIApp, faults: Faults, access_tokens: AccessTokens) -> None:
        self._app = app
        self._faults = faults
        self._access_tokens = access_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._faults.due(scope) if scope["type"] == "http" else None
        scope["fault"] = fault if isinstance(fault, QueryFault | StartupFault) else None
        match fault:
            case HttpError() | GrpcError():
                # An answer before the end of the request makes hypercorn drop the connection.
                await Request(scope, receive).body()
                await _refusal(fault)(scope, receive, send)
                return
            case Stall():
                if not await self._hold(_end_of_call(scope, receive)):
                    await _reset_connection(scope, receive)
                return
            case ConnectionReset():
                await _reset_connection(scope, receive)
                return
            case AnswerLost():
                await self._app(scope, receive, _lose)
                await _reset_connection(scope, receive)
                return
            case Delay(seconds=seconds):
                await self._hold(asyncio.sleep(seconds))
            case TokensExpire():
                self._access_tokens.expire()
            case CredentialsRevoked():
                self._access_tokens.expire()
                self._access_tokens.revoked = True
        await self._app(scope, receive, send)

    async def _hold(self, until: Coroutine[None, None, None]) -> bool:
        """Wait; whether it was to the end, and not cut short by the clearing of the faults."""
        cleared = self._faults.cleared
        waits = [asyncio.create_task(until), asyncio.create_task(cleared.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not cleared.is_set()


def _refusal(fault: HttpError | GrpcError) -> Response:
    if isinstance(fault, HttpError) and fault.message is None:
        return Response("<html>no service</html>", fault.status)
    error = EmulatorError(fault.message)
    if isinstance(fault, HttpError):
        error.http_status = fault.status
        return refusal(error)
    error.grpc_status = GrpcStatus[fault.code]
    return GrpcResponse(error=error)


async def _lose(message: Message) -> None:
    pass


async def _reset_connection(scope: Scope, receive: Receive) -> None:
    Connection.current.get().reset()
    # An answer to a connection that is gone would wait in hypercorn for ever.
    await _end_of_call(scope, receive)


async def _end_of_call(scope: Scope, receive: Receive) -> None:
    """Return when the client has given up this call or its connection is gone."""
    if scope["http_version"] == "2":
        while (await receive())["type"] != "http.disconnect":
            pass
    else:  # hypercorn reads nothing on while a call has no answer
        await Connection.current.get().ended.wait()


class Connection(asyncio.Protocol):
    """The connection of a call, which hypercorn shows to no application."""

    current: ClassVar[ContextVar["Connection"]] = ContextVar("connection")

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        self.ended = asyncio.Event()

    def reset(self) -> None:
        connection: socket.socket = self._transport.get_extra_info("socket")
        # Without time to linger, the other side is sent RST in place of FIN.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Inherited by the task that hypercorn creates here, and by those of its calls.
        self.current.set(self)
        self._protocol.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        self.ended.set()
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
        if isinstance(exc, ssl.SSLError):
            # Sent while the connection was being closed; hypercorn expects no error of TLS then.
            exc = ConnectionResetError(str(exc))
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()
