"""The kinds of what goes wrong on request."""

import re
from typing import Annotated, ClassVar

import msgspec

from polars_cloud_emulator.model.errors import GrpcStatus

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
