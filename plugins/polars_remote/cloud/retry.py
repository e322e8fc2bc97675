"""Retry calls while Polars Cloud is unavailable."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from ..settings import OUTAGE_SECONDS

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRANSIENT_STATUS = {"408", "425", "429", "500", "502", "503", "504"}
"""HTTP statuses that are retried."""

TRANSIENT_GRPC = (
    "Deadline expired before operation could complete",
    "Internal error",
    "Some resource has been exhausted",
    "The operation was aborted",
    "The operation was cancelled",
    "The service is currently unavailable",
    "Unknown error",
)
"""The client's texts for the gRPC statuses that are retried."""

TRANSIENT_TEXT = re.compile(
    r"Error calling gRPC endpoint, (" + "|".join(TRANSIENT_GRPC) + r"),"
    r"|Error setting up gRPC connection"
    r"|Error calling REST endpoint: error sending request"
    # The token endpoint did not answer, or a gateway answered in its place.
    r"|Error getting access token"
    r"|Error parsing access token JSON: (?!.*missing field `access_token`)"
)

LAST_ATTEMPT_SECONDS = 1.0
"""Seconds reserved for the last attempt before `time_limit` ends."""

SIGNAL_SECONDS = 0.5
"""Interval in seconds at which a wait lets Python handle signals."""

_deadline = ContextVar[float | None]("deadline", default=None)


def retry(function: Callable[[], T], *, call_timeout: float | None = OUTAGE_SECONDS / 4) -> T:
    """Return the function's result; retry the call while Polars Cloud is unavailable.

    The function runs in a thread. The caller waits in Python, where Airflow's time-outs and signals
    reach it.

    Parameters
    ----------
    function
        Function that may run more than once.
    call_timeout
        Seconds after which a call without a reply is abandoned; None for no limit.

    Raises
    ------
    Exception
        The last failure, as the function raised it, after `OUTAGE_SECONDS` or at the end of
        `time_limit`.
    TimeoutError
        The last call had no reply.
    """
    began = time.monotonic()
    ends = began + OUTAGE_SECONDS
    if (limit := _deadline.get()) is not None:
        ends = min(ends, limit - LAST_ATTEMPT_SECONDS)

    def attempt() -> T:
        timeout = call_timeout
        if limit is not None:
            left = max(limit - time.monotonic(), 0.1)
            timeout = left if timeout is None else min(timeout, left)
        return in_thread(function, timeout)

    def log_outage(state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        logger.warning(
            "Polars Cloud is unavailable, retrying in %.1f s (attempt %d, up to %.0f s): %s",
            state.next_action.sleep,
            state.attempt_number + 1,
            ends - began,
            state.outcome.exception(),
        )

    pause = wait_exponential(multiplier=0.2, max=10)
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=lambda _: time.monotonic() >= ends,
        # The last attempt is at the very end, so that an outage may last for the whole time.
        wait=lambda state: max(min(pause(state), ends - time.monotonic()), 0.0),
        before_sleep=log_outage,
        reraise=True,
    )
    return retrying(attempt)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limit the calls in the body to this many seconds in total."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def time_left(seconds: float) -> float:
    """Return `seconds`, capped by the enclosing `time_limit`."""
    limit = _deadline.get()
    return seconds if limit is None else min(seconds, limit - time.monotonic())


def is_transient(error: BaseException) -> bool:
    """Return whether to retry after the error. The client's errors differ in text, not in type."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    text = str(error)
    return bool(TRANSIENT_TEXT.match(text)) or http_status(text) in TRANSIENT_STATUS


def http_status(text: str) -> str | None:
    """Return the HTTP status in an error of the client's, or None if the error shows none."""
    message = text
    with suppress(ValueError, KeyError, TypeError):
        message = json.loads(text)["message"]
    found = re.match(r"Status (\d{3})\b", message)
    return found[1] if found else None


def in_thread(function: Callable[[], T], timeout: float | None = None) -> T:
    """Return the function's result. A signal interrupts the caller, not the function's thread.

    Raises
    ------
    TimeoutError
        There is no result after `timeout` seconds; the function keeps running.
    """
    future = start_thread(function)
    began = time.monotonic()
    while True:
        left = SIGNAL_SECONDS if timeout is None else began + timeout - time.monotonic()
        try:
            return future.result(min(left, SIGNAL_SECONDS))
        except TimeoutError:
            if future.done():
                return future.result()
            if left < SIGNAL_SECONDS:
                raise TimeoutError(f"no reply for {timeout:.1f} s") from None


def start_thread(function: Callable[[], T]) -> Future[T]:
    """Run the function in a daemon thread, and return the future of its result."""
    future = Future[T]()
    future.set_running_or_notify_cancel()  # an abandoned call cannot be canceled
    context = copy_context()  # by which Airflow finds the task's log

    def run() -> None:
        try:
            future.set_result(context.run(function))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="polars-cloud-call", daemon=True).start()
    return future
