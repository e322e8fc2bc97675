"""Log in to Polars Cloud with an Airflow Connection, and call Polars Cloud with that login."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

from airflow.sdk import BaseHook, Connection

from .airflow_versions import AirflowFailException, AirflowNotFoundException
from .outages import http_status, is_transient, retry
from .settings import OUTAGE_SECONDS

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The Connection that this process has logged in with. The client's own login is process-wide, too.
_conn_id = "polars_cloud"
_is_due = False

# Client ID of the emulator, and the user name in front of its address: neither is ever to meet the
# other side's counterpart.
EMULATOR = "polars-cloud-emulator"

# The client has one exception type for every login that failed: only the text tells a refusal
# from an outage.
REFUSED_LOGIN = "missing field `access_token`"
LOGGED_OUT = "The request does not have valid authentication credentials"


def log_in(conn_id: str) -> Exception | None:
    """Log in with the Connection; give back what went wrong, for the caller to raise.

    The frames in here hold the secret, and an exception that was raised in one shows its locals.
    """
    global _conn_id, _is_due
    _conn_id, _is_due = conn_id, False
    connection = find_connection(conn_id)
    if isinstance(connection, Exception):
        return connection
    assert connection.password, "find_connection has looked"

    try:
        import polars_cloud as pc  # costs ten times the rest of a DAG file when it is parsed
    except ImportError as error:
        return AirflowFailException(
            f"The client of Polars Cloud cannot be imported ({error}): install it here"
        )

    authenticate = functools.partial(
        pc.authenticate,
        client_id=connection.login,
        client_secret=connection.password,
        interactive=False,
    )
    try:
        retry(authenticate)
    except Exception as error:
        text = str(error)
        if REFUSED_LOGIN in text or http_status(text) == "401":
            return _settings_error(conn_id, "was refused by Polars Cloud")
        if isinstance(error, ValueError) and not is_transient(error):
            return error.with_traceback(None)
        reason = text.partition("\n\t")[0]  # without the hint to log in with a browser
        return ConnectionError(
            "Polars Cloud could not be reached: check the network of this worker and, if set, "
            "POLARS_CLOUD_API_ADDR and POLARS_CLOUD_DOMAIN in its environment "
            f"({reason.replace(connection.password, '***')})."
        )
    return None


def find_connection(conn_id: str) -> Connection | AirflowFailException:
    """Return the Connection if it can be used for a login, or else what is wrong with it."""
    try:
        connection = BaseHook.get_connection(conn_id)
    except AirflowNotFoundException:
        return _settings_error(conn_id, "is missing")
    if not connection.login:
        return _settings_error(conn_id, "has no login")
    if not connection.password:
        return _settings_error(conn_id, "has no password")
    is_emulators = connection.login == EMULATOR or connection.login.startswith(f"{EMULATOR}-")
    if is_emulators != talks_to_emulator():
        return AirflowFailException(
            f"The Airflow Connection {conn_id!r} was not used: its login is the emulator's, but "
            "this worker talks to Polars Cloud. Set the client ID of a service account."
            if is_emulators
            else f"The Airflow Connection {conn_id!r} was not used: its login is an account's, but "
            "this worker talks to the emulator. Unset POLARS_CLOUD_DOMAIN and "
            "POLARS_CLOUD_API_ADDR, or with Docker Compose set POLARS_CLOUD_EMULATOR=0 in .env."
        )
    return connection


def talks_to_emulator() -> bool:
    """Whether this worker's Polars Cloud is the emulator."""
    return os.environ.get("POLARS_CLOUD_DOMAIN", "").startswith("emulator@")


def log_in_when_called(conn_id: str) -> None:
    """Log in with the Connection as soon as Polars Cloud is called, and not before."""
    global _conn_id, _is_due
    _conn_id, _is_due = conn_id, True


def call_polars_cloud(
    function: Callable[..., T], *arguments: Any, call_timeout: float | None = OUTAGE_SECONDS / 4
) -> T:
    """Call Polars Cloud as `retry` does; log in again where the login has expired.

    Raises
    ------
    AirflowFailException
        Polars Cloud refuses the Connection's credentials.
    Exception
        As `retry`.
    """
    bound = functools.partial(function, *arguments)
    if _is_due and (error := log_in(_conn_id)):
        raise error
    try:
        return retry(bound, call_timeout=call_timeout)
    except Exception as error:
        if not is_logged_out(error):
            raise
        logger.warning("Login expired, logging in again: %s", error)
    if refused := log_in(_conn_id):
        raise refused
    return retry(bound, call_timeout=call_timeout)


def is_logged_out(error: BaseException) -> bool:
    """Whether Polars Cloud does not accept the login any more."""
    text = str(error)
    return LOGGED_OUT in text or http_status(text) == "401"


def _settings_error(conn_id: str, problem: str) -> AirflowFailException:
    return AirflowFailException(
        f"The Airflow Connection {conn_id!r} {problem}: under Admin > Connections, in "
        f"AIRFLOW_CONN_{conn_id.upper()} or in your secrets backend, set type = HTTP, "
        "login = client ID and password = client secret of a Polars Cloud service account."
    )
