"""Log a task in to Polars Cloud with an Airflow Connection.

    @task
    @authenticate
    def run_query() -> str: ...

The Connection is `polars_cloud`, or the one named by `@authenticate(conn_id="...")`: type HTTP,
login = client ID and password = client secret of a service account.
"""

import asyncio
import functools
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, get_type_hints, overload

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException

P = ParamSpec("P")
R = TypeVar("R")

# The Connection of the task that is running.
_conn_id = ContextVar[str]("conn_id")

# Client ID of the emulator, and the user name in front of its address: neither is ever to meet the
# other side's counterpart.
EMULATOR = "polars-cloud-emulator"

# The client has one exception type for every login that failed: only the text tells a refusal,
# by the token endpoint or by the REST API, from an outage.
REFUSALS = ("missing field `access_token`", "Status 401 Unauthorized")


@overload
def authenticate(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def authenticate(*, conn_id: str = ...) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def authenticate(
    function: Callable[..., Any] | None = None, /, *, conn_id: str = "polars_cloud"
) -> Callable[..., Any]:
    """Log in to Polars Cloud each time `function` is about to run; goes below `@task`.

    Signature and annotations stay those of `function`, which may be `async`.

    Parameters
    ----------
    function
        What the task runs.
    conn_id
        Id of the Airflow Connection.

    Raises
    ------
    TypeError
        While the DAG file is parsed: this decorates anything but a function.
    AirflowFailException
        At run time, not retried: the Connection is missing, incomplete or refused.
    ConnectionError
        At run time, retried: Polars Cloud cannot be reached.
    ValueError
        At run time, retried: any other answer, in the words of Polars Cloud.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if not inspect.isfunction(function):
            raise TypeError(
                "@authenticate decorates a function: put it below @task, "
                'and name another Connection as @authenticate(conn_id="...")'
            )

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                _conn_id.set(conn_id)
                if error := await asyncio.to_thread(_log_in, conn_id):
                    raise error
                return await function(*args, **kwargs)

        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                _conn_id.set(conn_id)
                if error := _log_in(conn_id):
                    raise error
                return function(*args, **kwargs)

        # TaskFlow looks names in a postponed annotation up in the wrapper's module, which is not
        # the DAG file: resolve the one it reads, the return type.
        if "return" in function.__annotations__:
            returns = SimpleNamespace(__annotations__={"return": wrapper.__annotations__["return"]})
            with suppress(NameError, TypeError):  # imported under TYPE_CHECKING only, say
                resolved = get_type_hints(returns, inspect.unwrap(function).__globals__)
                wrapper.__annotations__ = wrapper.__annotations__ | resolved
        return wrapper

    return decorate if function is None else decorate(function)


def log_in_again() -> None:
    """Log the current task in anew, with the Connection of its `authenticate`.

    Raises
    ------
    AirflowFailException, ConnectionError, ValueError
        As `authenticate`.
    """
    if error := _log_in(_conn_id.get()):
        raise error


def _log_in(conn_id: str) -> Exception | None:
    """Give back what went wrong, for the caller to raise: this frame's locals hold the secret."""
    try:
        connection = BaseHook.get_connection(conn_id)
    except AirflowNotFoundException:
        return _settings_error(conn_id, "is missing")
    if not connection.login:
        return _settings_error(conn_id, "has no login")
    if not connection.password:
        return _settings_error(conn_id, "has no password")
    if (connection.login == EMULATOR) != _talks_to_emulator():
        return AirflowFailException(
            f"The Airflow Connection {conn_id!r} was not used: its login is the emulator's, but "
            "this worker talks to Polars Cloud. Set the client ID of a service account."
            if connection.login == EMULATOR
            else f"The Airflow Connection {conn_id!r} was not used: its login is an account's, but "
            "this worker talks to the emulator. Unset POLARS_CLOUD_DOMAIN and "
            "POLARS_CLOUD_API_ADDR, or with Docker Compose set POLARS_CLOUD_EMULATOR=0 in .env."
        )

    import polars_cloud as pc  # costs ten times the rest of a DAG file when it is parsed

    try:
        pc.authenticate(
            client_id=connection.login, client_secret=connection.password, interactive=False
        )
    except Exception as error:
        text = str(error)
        if any(refusal in text for refusal in REFUSALS):
            return _settings_error(conn_id, "was refused by Polars Cloud")
        if isinstance(error, ValueError):
            return error.with_traceback(None)
        reason = text.partition("\n\t")[0]  # without the hint to log in with a browser
        return ConnectionError(
            "Polars Cloud could not be reached: check the network of this worker and, if set, "
            "POLARS_CLOUD_API_ADDR and POLARS_CLOUD_DOMAIN in its environment "
            f"({reason.replace(connection.password, '***')})."
        )
    return None


def _talks_to_emulator() -> bool:
    return os.environ.get("POLARS_CLOUD_DOMAIN", "").startswith("emulator@")


def _settings_error(conn_id: str, problem: str) -> AirflowFailException:
    return AirflowFailException(
        f"The Airflow Connection {conn_id!r} {problem}: under Admin > Connections, in "
        f"AIRFLOW_CONN_{conn_id.upper()} or in your secrets backend, set type = HTTP, "
        "login = client ID and password = client secret of a Polars Cloud service account."
    )
