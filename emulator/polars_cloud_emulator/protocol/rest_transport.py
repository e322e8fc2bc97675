"""JSON requests and responses, in the format of the client."""

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
    """An error response whose message the client shows; it shows any other body as raw text.

    Some calls of the client show only the status line, so the reason phrase is the message, too.
    """

    def __init__(self, error: EmulatorError) -> None:
        content = msgspec.json.encode({"message": str(error), "errors": {}})
        super().__init__(content, error.http_status, media_type="application/json")
        # The message may quote the request, and a line break would end the status line.
        self._reason = re.sub(r"[^ -~]+", " ", str(error))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (connection := Connection.current.get(None)) is not None:
            connection.reason = self._reason
        await super().__call__(scope, receive, send)


def refusal(error: EmulatorError) -> Response:
    return Refusal(error)


def positive_parameter(request: Request, name: str, default: int) -> int:
    """Return a positive integer of the query string.

    Raises
    ------
    InvalidRequest
        The parameter is not an integer, or is less than 1.
    """
    text = request.query_params.get(name, str(default))
    # At most 18 significant digits, which fit into 64 bits.
    if re.fullmatch("0*[1-9][0-9]{0,17}", text, re.ASCII) is None:
        raise InvalidRequest(f"{name} must be a whole number from 1, not '{text}'")
    return int(text)


async def decode_body(request: Request, model: type[T]) -> T:
    """Return the request's JSON body.

    Raises
    ------
    InvalidRequest
        The body is not JSON, or not a ``model``.
    TooLarge
        The body has more than ``MAX_JSON`` bytes.
    """
    body = await read_body(request, MAX_JSON)
    try:
        return msgspec.json.decode(body, type=model)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"cannot decode the body of {request.url.path}: {error}") from None
