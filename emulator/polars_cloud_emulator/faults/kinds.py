"""The kinds of faults."""

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
    """A fault that applies ``times`` times, first to the ``nth`` next call of ``operation``."""

    operations: ClassVar[str] = ".+"
    """Pattern of the operations that this kind of fault supports."""

    operation: str
    nth: Count = 1
    times: Count = 1


class HttpError(Fault):
    """An error response of the service or, without a message, of a gateway in front of it."""

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
            raise ValueError(f"unknown code '{self.code}'; the codes are {', '.join(known)}")


class ConnectionReset(Fault):
    """The connection is reset; the call has no effect."""


class AnswerLost(Fault):
    """The call takes effect, but the connection is reset instead of a response."""


class Delay(Fault):
    """The call is delayed, by the wall clock."""

    seconds: Seconds


class Stall(Fault):
    """No response, and no effect; the connection is reset when the faults are cleared."""


class TokensExpire(Fault):
    """All access tokens issued so far expire with this call."""


class CredentialsRevoked(Fault):
    """All access tokens expire, and logins are refused until the faults are cleared."""


class QueryFails(Fault):
    operations = SUBMIT
    error: Annotated[str, msgspec.Meta(pattern=r"^\w+: ")]
    """``Type: text``, from which the client constructs the exception."""


class QueryHangs(Fault):
    """The query occupies its workers until it is canceled or the cluster stops."""

    operations = SUBMIT


class QueryTakes(Fault):
    """The query occupies its workers for this time on the emulator's clock before it runs."""

    operations = SUBMIT
    seconds: Seconds


class QueryWaits(Fault):
    """The query is scheduled without a worker for this time on the emulator's clock."""

    operations = SUBMIT
    seconds: Seconds


class WorkerKilled(Fault):
    """The process that runs the query gets SIGKILL."""

    operations = SUBMIT


class ClusterLost(Fault):
    """The cluster fails as soon as it runs the query."""

    operations = SUBMIT
    message: str


class StartupFails(Fault):
    operations = STARTS
    message: str


class StartupTakes(Fault):
    """The cluster is ``Starting`` for this time on the emulator's clock."""

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
