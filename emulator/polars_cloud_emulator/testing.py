"""An emulator for a test suite, in a separate process and on free ports."""

import base64
import contextlib
import functools
import json
import os
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from polars_cloud_emulator.env_file import read_env_file
from polars_cloud_emulator.model.workspace import WORKSPACE_ID
from polars_cloud_emulator.protocol.journal import ADMIN_PREFIX
from polars_cloud_emulator.workers.isolated_python import python, without_path

T = TypeVar("T")

STOP_TIMEOUT = 30.0
"""Seconds until a stopping emulator is killed."""


@dataclass(frozen=True)
class RunningEmulator:
    """An emulator in another process.

    Attributes
    ----------
    environment
        Environment variables of a client.
    pid
        Process id of the emulator.
    """

    environment: dict[str, str]
    pid: int

    @property
    def rest_url(self) -> str:
        return self.environment["POLARS_CLOUD_API_ADDR"]

    def state(self) -> dict[str, Any]:
        """Return manifests, clusters, queries, faults and unmatched calls from the admin API."""
        state: dict[str, Any] = self._ask("GET", "state")
        return state

    def journal(self) -> list[dict[str, Any]]:
        """Return the latest calls, oldest first."""
        journal: list[dict[str, Any]] = self._ask("GET", "journal")
        return journal

    def reset(self) -> None:
        """Stop every cluster, and restore the state of the emulator's first start."""
        self._ask("POST", "reset")

    def add_fault(self, operation: str, kind: str, **fields: object) -> None:
        """Add a fault. The README lists the kinds of faults and their fields.

        Parameters
        ----------
        operation
            A gRPC method (``SubmitQuery``) or a REST call (``GET compute/{id}``).

        Raises
        ------
        ValueError
            The fault does not exist; the message lists the kinds or the operations.
        """
        self._ask("POST", "faults", {"operation": operation, "kind": kind, **fields})

    def clear_faults(self) -> None:
        """Remove all pending faults, and accept the client's secret again."""
        self._ask("DELETE", "faults")

    def add_service_account(self, name: str) -> tuple[str, str]:
        """Add a service account until the next reset, and return its client id and secret.

        Parameters
        ----------
        name
            Suffix of the client id: lower-case letters, digits and hyphens.

        Raises
        ------
        ValueError
            The name is in use, or has other characters.
        """
        answer = self._ask("POST", "service-accounts", {"name": name})
        return answer["client_id"], answer["client_secret"]

    def advance_clock(self, by: timedelta) -> datetime:
        """Advance the clock of billing, expiry and timeouts, and return the new time.

        Access tokens expire, too. The client does not notice this, so log in again.
        """
        answer = self._ask("POST", "clock", {"advance_seconds": by.total_seconds()})
        return datetime.fromisoformat(answer["now"])

    def call(self, method: str, path: str, body: dict[str, object] | None = None) -> Any:
        """Call the workspace's REST API without the client, and return the response.

        Parameters
        ----------
        path
            Path relative to the workspace, such as ``query/{id}/cancel``.

        Raises
        ------
        ValueError
            The emulator refuses the call; with its error message.
        """
        user = f"{self.environment['POLARS_CLOUD_CLIENT_ID']}@sa.cloud.pola.rs"
        form = {
            "grant_type": "password",
            "username": user,
            "password": self.environment["POLARS_CLOUD_CLIENT_SECRET"],
        }
        login = f"https://{self.environment['POLARS_CLOUD_DOMAIN'].partition('@')[2]}"
        [authority] = Path(self.environment["SSL_CERT_DIR"]).iterdir()
        token = _send(
            urllib.request.Request(
                f"{login}/realms/Polars/protocol/openid-connect/token",
                data=urllib.parse.urlencode(form).encode(),
            ),
            authority,
        )
        headers = {
            "authorization": f"Bearer {token['access_token']}",
            "content-type": "application/json",
            "x-client-version": version("polars-cloud"),
            "x-polars-version": version("polars"),
        }
        return _send(
            urllib.request.Request(
                f"{self.rest_url}/api/v1/workspace/{WORKSPACE_ID}/{path}",
                data=json.dumps(body).encode() if body else None,
                headers=headers,
                method=method,
            )
        )

    def _ask(self, method: str, call: str, body: dict[str, object] | None = None) -> Any:
        account = [self.environment[f"POLARS_CLOUD_CLIENT_{part}"] for part in ("ID", "SECRET")]
        credentials = base64.b64encode(":".join(account).encode()).decode()
        return _send(
            urllib.request.Request(
                f"{self.rest_url}{ADMIN_PREFIX}{call}",
                data=json.dumps(body).encode() if body else None,
                headers={
                    "authorization": f"Basic {credentials}",
                    "content-type": "application/json",
                },
                method=method,
            )
        )


@contextlib.contextmanager
def running_emulator(
    state_dir: Path | None = None, *, realistic: bool = False, on_premises: bool = False
) -> Iterator[RunningEmulator]:
    """Run an emulator while the context is open. It also ends when this process ends or is killed.

    Put its ``environment`` into ``os.environ`` before ``polars_cloud`` is imported for the first
    time, because the client reads the variables on import.

    Parameters
    ----------
    state_dir
        Directory in which a restarted emulator finds its state; a temporary one if None.
    realistic
        Start clusters, expire results and name files as on Polars Cloud.
    on_premises
        Emulate an on-premises cluster, at ``POLARS_CLUSTER_URI``, instead of Polars Cloud.

    Raises
    ------
    RuntimeError
        The emulator did not start; with the reason.
    """
    with tempfile.TemporaryDirectory() as scratch:
        env_file = Path(scratch) / "env"
        command = python("polars_cloud_emulator", "serve", "--parent", os.getpid())
        command += ["--port-base", "0", "--env-file", str(env_file)]
        command += ["--state-dir", str(state_dir or Path(scratch) / "state")]
        command += ["--realistic"] if realistic else []
        command += ["--on-premises"] if on_premises else []
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=without_path(os.environ),
            # Ctrl-C must reach only the test suite, which then stops the emulator.
            start_new_session=True,
        ) as process:
            try:
                assert process.stdout is not None
                first_line = process.stdout.readline()
                if not env_file.exists():
                    end = first_line.strip() or f"its process ended with code {process.wait()}"
                    raise RuntimeError(f"the emulator did not start: {end}")
                yield RunningEmulator(read_env_file(env_file), process.pid)
            finally:
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise


def eventually(condition: Callable[[], T], seconds: float = 120.0, *, pause: float = 0.01) -> T:
    """Wait until a condition returns a true value, and return the value.

    Parameters
    ----------
    seconds
        Timeout.
    pause
        Poll interval in seconds; longer if polling slows down what the condition waits for.

    Raises
    ------
    AssertionError
        The condition did not hold before the timeout.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        time.sleep(pause)
    return value


@functools.cache  # loading the system's certificates takes longer than a call
def _opener(authority: Path | None) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=authority)),
    )


def _send(request: urllib.request.Request, authority: Path | None = None) -> Any:
    """Send a request without a proxy, and return the JSON of the response; None if it is empty."""
    try:
        with _opener(authority).open(request) as answer:
            return json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        raise ValueError(json.load(error)["message"]) from None
