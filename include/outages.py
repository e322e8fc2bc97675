"""Call Polars Cloud so that a short outage does not fail a task."""

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_exponential,
)

from include.auth import log_in_again
from include.settings import OUTAGE

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRANSIENT = (
    # No answer, or one of a gateway that stands in front of the service.
    "Error getting access token",
    "error sending request",
    "transport error",
    "Status 429",
    "Status 5",
    # The client's names for gRPC's ABORTED, INTERNAL, RESOURCE_EXHAUSTED and UNAVAILABLE.
    "The operation was aborted",
    "Internal error",
    "Some resource has been exhausted",
    "The service is currently unavailable",
)
LOGGED_OUT = (
    "Status 401",
    "The request does not have valid authentication credentials",
)


def call(
    function: Callable[..., T],
    *arguments: Any,
    timeout: float | None = OUTAGE / 4,
    budget: float = OUTAGE,
) -> T:
    """Call Polars Cloud; when it is out of order, again until it is not.

    A login that Polars Cloud no longer accepts is renewed. The call runs in a thread, and this one
    waits in Python, where Airflow's time-outs and signals reach it.

    Parameters
    ----------
    function, arguments
        The call. May be carried out more than once.
    timeout
        Seconds after which a call that has no answer is left to itself; None: never.
    budget
        Seconds after which a further failure is final.

    Raises
    ------
    Exception
        The last failure, as the client raised it.
    TimeoutError
        The last call was not answered.
    AirflowFailException
        Polars Cloud refuses the Connection's credentials.
    """

    bound = functools.partial(function, *arguments)

    def attempt() -> T:
        try:
            return _in_thread(bound, timeout)
        except Exception as error:
            if not any(text in str(error) for text in LOGGED_OUT):
                raise
            logger.warning("Polars Cloud no longer accepts this login, which is renewed: %s", error)
            log_in_again()
            return _in_thread(bound, timeout)

    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_delay(budget),
        wait=wait_exponential(multiplier=0.2, max=10),
        before_sleep=_log_outage,
        reraise=True,
    )
    return retrying(attempt)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later.

    The client has no exception types for this, only texts.
    """
    return isinstance(error, TimeoutError | ConnectionError) or any(
        text in str(error) for text in TRANSIENT
    )


def _log_outage(state: RetryCallState) -> None:
    assert state.outcome is not None
    logger.warning("Polars Cloud is out of order, and asked again: %s", state.outcome.exception())


def _in_thread(function: Callable[[], T], timeout: float | None) -> T:
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="polars-cloud-call", daemon=True).start()
    try:
        return future.result(timeout)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"Polars Cloud gave no answer for {timeout} s") from None
