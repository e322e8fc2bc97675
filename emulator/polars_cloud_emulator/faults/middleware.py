"""Fault middleware."""

import asyncio
from collections.abc import Coroutine

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polars_cloud_emulator.faults.kinds import (
    AnswerLost,
    ConnectionReset,
    CredentialsRevoked,
    Delay,
    GrpcError,
    HttpError,
    QueryFault,
    Stall,
    StartupFault,
    TokensExpire,
)
from polars_cloud_emulator.faults.pending import Faults
from polars_cloud_emulator.model.errors import EmulatorError, GrpcStatus
from polars_cloud_emulator.protocol.access_tokens import AccessTokens
from polars_cloud_emulator.protocol.connections import Connection
from polars_cloud_emulator.protocol.grpc_transport import GrpcResponse
from polars_cloud_emulator.protocol.rest_transport import refusal


class FaultMiddleware:
    """Applies the due fault, if any, to each call.

    Faults of a query or a start-up are passed on to the application in ``scope["fault"]``.
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
                await _refusal(fault)(scope, receive, send)
                return
            case Stall():
                if not await self._wait_unless_cleared(_end_of_call(scope, receive)):
                    await _reset_connection(scope, receive)
                return
            case ConnectionReset():
                await _reset_connection(scope, receive)
                return
            case AnswerLost():
                await self._app(scope, receive, _discard)
                await _reset_connection(scope, receive)
                return
            case Delay(seconds=seconds):
                await self._wait_unless_cleared(asyncio.sleep(seconds))
            case TokensExpire():
                self._access_tokens.expire()
            case CredentialsRevoked():
                self._access_tokens.expire()
                self._access_tokens.revoked = True
        await self._app(scope, receive, send)

    async def _wait_unless_cleared(self, until: Coroutine[None, None, None]) -> bool:
        """Wait for a coroutine, or until the faults are cleared; False if they were cleared."""
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


async def _discard(message: Message) -> None:
    pass


async def _reset_connection(scope: Scope, receive: Receive) -> None:
    Connection.current.get().reset()
    # A response to a closed connection would wait in hypercorn forever.
    await _end_of_call(scope, receive)


async def _end_of_call(scope: Scope, receive: Receive) -> None:
    """Return when the client has canceled this call or its connection is closed."""
    if scope["http_version"] == "2":
        while (await receive())["type"] != "http.disconnect":
            pass
    else:  # on HTTP/1.1, hypercorn does not read further while a call has no response
        await Connection.current.get().ended.wait()
