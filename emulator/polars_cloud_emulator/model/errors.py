"""Errors of the emulator, each with its HTTP and gRPC status."""

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
    """An error whose message the client shows to its user."""

    http_status: int = 500
    grpc_status: GrpcStatus = GrpcStatus.INTERNAL


class CannotPersist(EmulatorError):
    """A change was not made, because it cannot be written to disk."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"the emulator cannot write its state ({cause}): free disk space, and try again"
        )


class InvalidRequest(EmulatorError):
    """The content of a request is wrong. Over gRPC, the client raises it as ``ComputeError``."""

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
    """The request is valid, but not in this state or from this client; a retry cannot help."""

    http_status = 400
    grpc_status = GrpcStatus.FAILED_PRECONDITION


class TooLarge(EmulatorError):
    http_status = 413
    grpc_status = GrpcStatus.RESOURCE_EXHAUSTED


class UnsupportedType(EmulatorError):
    """The request has a content type that its route does not accept."""

    http_status = 415
    grpc_status = GrpcStatus.INVALID_ARGUMENT


class UnknownCall(EmulatorError):
    """The route does not exist. The client does not retry 501 and UNIMPLEMENTED."""

    http_status = 501
    grpc_status = GrpcStatus.UNIMPLEMENTED


class Unavailable(EmulatorError):
    """The request can be retried; the client retries ``GetQueryResult`` after a second."""

    http_status = 503
    grpc_status = GrpcStatus.UNAVAILABLE


class DeadlineExceeded(EmulatorError):
    http_status = 504
    grpc_status = GrpcStatus.DEADLINE_EXCEEDED
