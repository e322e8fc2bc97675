"""The emulator's refusals, and what each becomes on the wire."""

from enum import IntEnum


class GrpcStatus(IntEnum):
    """Status codes of gRPC (https://grpc.github.io/grpc/core/md_doc_statuscodes.html)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class EmulatorError(Exception):
    """Something the emulator refuses, in words that the client's user sees."""

    http_status: int = 500
    grpc_status: GrpcStatus = GrpcStatus.INTERNAL


class CannotPersist(EmulatorError):
    """Nothing was done: what a client is told must outlive the emulator's process."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"the emulator cannot keep its state ({cause}): make room for it, and ask again"
        )


class InvalidRequest(EmulatorError):
    """The call is understood and its content is wrong. On gRPC the user gets a ``ComputeError``."""

    http_status = 400
    grpc_status = GrpcStatus.INVALID_ARGUMENT


class Unauthenticated(EmulatorError):
    http_status = 401
    grpc_status = GrpcStatus.UNAUTHENTICATED


class PermissionDenied(EmulatorError):
    http_status = 403
    grpc_status = GrpcStatus.PERMISSION_DENIED


class NotFound(EmulatorError):
    http_status = 404
    grpc_status = GrpcStatus.NOT_FOUND


class Conflict(EmulatorError):
    http_status = 409
    grpc_status = GrpcStatus.ALREADY_EXISTS


class WrongState(EmulatorError):
    """Right call, wrong moment or wrong client: repeating it cannot help."""

    http_status = 400
    grpc_status = GrpcStatus.FAILED_PRECONDITION


class TooLarge(EmulatorError):
    http_status = 413
    grpc_status = GrpcStatus.RESOURCE_EXHAUSTED


class UnsupportedType(EmulatorError):
    """The content is not of the type that the call takes."""

    http_status = 415
    grpc_status = GrpcStatus.INVALID_ARGUMENT


class UnknownCall(EmulatorError):
    """No retry by the client: it answers 501 and UNIMPLEMENTED at once."""

    http_status = 501
    grpc_status = GrpcStatus.UNIMPLEMENTED


class Unavailable(EmulatorError):
    """Ask again: the client repeats ``GetQueryResult`` after a second."""

    http_status = 503
    grpc_status = GrpcStatus.UNAVAILABLE


class DeadlineExceeded(EmulatorError):
    http_status = 504
    grpc_status = GrpcStatus.DEADLINE_EXCEEDED
