"""JSON over HTTP in the form that the client reads."""

import re
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polars_cloud_emulator.model.errors import EmulatorError, InvalidRequest
from polars_cloud_emulator.protocol.connections import Connection
from polars_cloud_emulator.protocol.request_bodies import MAX_JSON, read_body

T = TypeVar("T")


def json_response(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


class Refusal(Response):
    """An error whose message the client shows as it is; any other form it shows raw.

    Some of its calls show the status line alone: the message stands there, too.
    """

    def __init__(self, error: EmulatorError) -> None:
        content = msgspec.json.encode({"message": str(error), "errors": {}})
        super().__init__(content, error.http_status, media_type="application/json")
        # What the caller sent may stand in it, and nothing of that may end the line.
        self._reason = re.sub(r"[^ -~]+", " ", str(error))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (connection := Connection.current.get(None)) is not None:
            connection.reason = self._reason
        await super().__call__(scope, receive, send)


def refusal(error: EmulatorError) -> Response:
    return Refusal(error)


def positive_parameter(request: Request, name: str, default: int) -> int:
    """A parameter of the query string that counts something.

    Raises
    ------
    InvalidRequest
        It is no whole number, or less than 1.
    """
    text = request.query_params.get(name, str(default))
    # More digits than these are nothing that anyone counts to.
    if re.fullmatch("0*[1-9][0-9]{0,17}", text, re.ASCII) is None:
        raise InvalidRequest(f"{name} is a whole number from 1, not '{text}'")
    return int(text)


async def decode_body(request: Request, model: type[T]) -> T:
    """The request's JSON body.

    Raises
    ------
    InvalidRequest
        It is not JSON, or not a ``model``.
    TooLarge
        It is too large.
    """
    body = await read_body(request, MAX_JSON)
    try:
        return msgspec.json.decode(body, type=model)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body of {request.url.path} is not understood: {error}") from None
