"""Call Polars Cloud with the login of an Airflow Connection."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.sdk import BaseHook, Connection

from ..compat.versions import AirflowNotFoundException
from ..errors import LoginRefusedError, WorkspaceNotFoundError
from ..settings import OUTAGE_SECONDS, WORKSPACE
from .client import ClusterAccess
from .retry import http_status, is_transient, retry

if TYPE_CHECKING:
    from polars_cloud import Workspace

logger = logging.getLogger(__name__)

T = TypeVar("T")

EMULATOR = "polars-cloud-emulator"
"""Client ID of the emulator's account. It is never sent to the real service. A real client ID is
never sent to the emulator."""

# The client has one exception type for every failed login. Only the text shows whether it was a
# refusal or an outage.
REFUSED_LOGIN = "missing field `access_token`"
LOGGED_OUT = "The request does not have valid authentication credentials"


ACCESS = {"ca_cert", "headers", "domain_name"}
"""Keys of a Connection's extra, as in `ClusterAccess`."""


class NoAccountError(LoginRefusedError):
    """The Connection has no login, and can only be used for clusters of your own."""


class CloudSession:
    """Calls to Polars Cloud with the login of one Airflow Connection.

    The client has one login per process. Sessions of other Connections wait until it is free.

    Parameters
    ----------
    conn_id
        Id of the Airflow Connection.
    """

    def __init__(self, conn_id: str) -> None:
        self.conn_id = conn_id
        self._workspace: Workspace | None = None

    def log_in(self) -> None:
        """Log in now instead of at the first call.

        Raises
        ------
        LoginRefusedError
            Not retried: the Connection is missing, incomplete or refused.
        ConnectionError
            Polars Cloud is unreachable.
        ValueError
            Polars Cloud answered with another error.
        """
        with _login.use(self.conn_id, renew=True):
            pass

    def check_account(self) -> None:
        """Raise `LoginRefusedError` if the Connection has no login."""
        with self.logged_in():
            if _login.without_account:
                raise _login.without_account

    @contextmanager
    def logged_in(self) -> Iterator[None]:
        """Use this login for the calls in the block. Raises the errors of `log_in`."""
        with _login.use(self.conn_id):
            yield

    def call(
        self,
        function: Callable[..., T],
        *arguments: Any,
        call_timeout: float | None = OUTAGE_SECONDS / 4,
    ) -> T:
        """Return the function's result, called with this login and with retries.

        Logs in again if the login has expired.

        Raises
        ------
        Exception
            Any error of `log_in` or `retry`.
        """
        bound = functools.partial(function, *arguments)
        with self.logged_in():
            try:
                return retry(bound, call_timeout=call_timeout)
            except Exception as error:
                if not is_logged_out(error):
                    raise
                if _login.without_account:
                    raise LoginRefusedError(
                        f"The cluster did not accept the headers of the Airflow Connection "
                        f'{self.conn_id!r}: correct "headers" in its extra'
                    ) from error
                logger.warning("Login expired, logging in again: %s", error)
            if refused := log_in(self.conn_id):
                raise refused
            return retry(bound, call_timeout=call_timeout)

    def find_workspace(self) -> Workspace:
        """Return the workspace named by `POLARS_CLOUD_WORKSPACE`; it is looked up once.

        Raises
        ------
        WorkspaceNotFoundError
            The account has no such workspace. The message lists those that it has.
        """
        if self._workspace is None:
            self.check_account()
            self._workspace = self.call(_find_workspace)
        return self._workspace


class _Login:
    """The client's login: one per process, for any number of threads of one account."""

    def __init__(self) -> None:
        self._turns = threading.Condition()
        self._conn_id: str | None = None
        self._users = 0
        self._waiting: list[str] = []
        self.without_account: NoAccountError | None = None
        """Error of the current Connection, if it has no login."""
        self._current = ContextVar[str | None]("current", default=None)
        """Connection that the current thread, or the thread that started it, is using."""

    @contextmanager
    def use(self, conn_id: str, *, renew: bool = False) -> Iterator[None]:
        if self._current.get() == conn_id:
            yield
            return
        self._begin(conn_id, renew)
        token = self._current.set(conn_id)
        try:
            yield
        finally:
            self._current.reset(token)
            with self._turns:
                self._users -= 1
                self._turns.notify_all()

    def _begin(self, conn_id: str, renew: bool) -> None:
        with self._turns:
            self._waiting.append(conn_id)
            # First come, first served: a busy account must not starve another one.
            try:
                self._turns.wait_for(
                    lambda: (
                        (not self._users and self._waiting[0] == conn_id)
                        or (self._conn_id == conn_id and set(self._waiting) == {conn_id})
                    )
                )
            finally:
                self._waiting.remove(conn_id)
            if renew or self._conn_id != conn_id:
                self._conn_id = self.without_account = None
                error = log_in(conn_id)
                if isinstance(error, NoAccountError):
                    self.without_account = error
                elif error:
                    self._turns.notify_all()
                    raise error
                self._conn_id = conn_id
            self._users += 1
            self._turns.notify_all()


_login = _Login()


def log_in(conn_id: str) -> Exception | None:
    """Log in with the Connection. Return the error, if any, for the caller to raise.

    If it were raised here, its traceback would show the secret, a local variable.
    """
    connection = find_connection(conn_id)
    if isinstance(connection, Exception):
        return connection
    assert connection.password, "find_connection checks it"

    try:
        import polars_cloud as pc  # takes ten times as long as the rest of parsing a DAG file
    except ImportError as error:
        return LoginRefusedError(
            f"polars_cloud cannot be imported here ({error}): install polars-cloud on this machine"
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
            return _refuse(conn_id, "was refused by Polars Cloud")
        if isinstance(error, ValueError) and not is_transient(error):
            return error.with_traceback(None)
        reason = text.partition("\n\t")[0]  # without the hint to log in with a browser
        return ConnectionError(
            "Polars Cloud could not be reached: check the network of this worker and, if set, "
            "POLARS_CLOUD_API_ADDR and POLARS_CLOUD_DOMAIN in its environment "
            f"({reason.replace(connection.password, '***')})."
        )
    return None


def find_connection(conn_id: str) -> Connection | LoginRefusedError:
    """Return the Connection, or the error if it cannot be used to log in."""
    try:
        connection = BaseHook.get_connection(conn_id)
    except AirflowNotFoundException:
        return _refuse(conn_id, "is missing")
    if not connection.login and ACCESS & connection.extra_dejson.keys():
        return NoAccountError(
            f"The Airflow Connection {conn_id!r} has no login, so it can only be used for clusters "
            'of your own: pass {"uri": ...} to use_cluster, or set a login and a password'
        )
    if not connection.login:
        return _refuse(conn_id, "has no login")
    if not connection.password:
        return _refuse(conn_id, "has no password")
    is_emulators = connection.login == EMULATOR or connection.login.startswith(f"{EMULATOR}-")
    if is_emulators != uses_emulator():
        return LoginRefusedError(
            f"The Airflow Connection {conn_id!r} was not used: its login is the emulator's, but "
            "this worker talks to Polars Cloud. Set the client ID of a service account."
            if is_emulators
            else f"The Airflow Connection {conn_id!r} was not used: its login is an account's, but "
            "this worker talks to the emulator. Unset POLARS_CLOUD_DOMAIN and "
            "POLARS_CLOUD_API_ADDR, or with Docker Compose set POLARS_CLOUD_EMULATOR=0 in .env."
        )
    return connection


def find_access(conn_id: str) -> ClusterAccess | LoginRefusedError:
    """Return the access to clusters of your own in the Connection's extra, or an error.

    If the error were raised here, its traceback would show the headers, a local variable.
    """
    try:
        extra = BaseHook.get_connection(conn_id).extra_dejson
    except AirflowNotFoundException:
        return _refuse(conn_id, "is missing")
    ca_cert, domain_name = extra.get("ca_cert"), extra.get("domain_name")
    headers = extra.get("headers") or {}
    if not isinstance(headers, dict) or not all(
        isinstance(each, str)
        for each in (ca_cert or "", domain_name or "", *headers, *headers.values())
    ):
        return LoginRefusedError(
            f"The extra of the Airflow Connection {conn_id!r} must have the form "
            '{"ca_cert": "-----BEGIN CERTIFICATE-----\\n...", "headers": {"name": "value"}, '
            '"domain_name": "..."}. Each key may be left out'
        )
    return ClusterAccess(ca_cert, headers, domain_name)


def uses_emulator() -> bool:
    """Return whether this process is configured for the emulator."""
    return os.environ.get("POLARS_CLOUD_DOMAIN", "").startswith("emulator@")


def is_logged_out(error: BaseException) -> bool:
    """Return whether the error shows that the login has expired or is missing."""
    text = str(error)
    return LOGGED_OUT in text or http_status(text) == "401"


def _find_workspace() -> Workspace:
    from polars_cloud import Workspace
    from polars_cloud.exceptions import WorkspaceResolveError

    try:
        return Workspace(WORKSPACE)
    except WorkspaceResolveError as error:
        problem = str(error).splitlines()[0].rstrip(".")
    names = ", ".join(sorted(workspace.name for workspace in Workspace.list()))
    raise WorkspaceNotFoundError(
        f"{problem}. Set POLARS_CLOUD_WORKSPACE to a workspace of this account: "
        f"{names or 'it has none yet, so make one in Polars Cloud first'}"
    )


def _refuse(conn_id: str, problem: str) -> LoginRefusedError:
    return LoginRefusedError(
        f"The Airflow Connection {conn_id!r} {problem}: under Admin > Connections, in "
        f"AIRFLOW_CONN_{conn_id.upper()} or in your secrets backend, set type = HTTP, "
        "login = client ID and password = client secret of a Polars Cloud service account."
    )
