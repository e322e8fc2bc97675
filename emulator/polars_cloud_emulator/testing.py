"""An emulator for a test suite: in a process of its own, on free ports."""

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
        Every variable that a client needs.
    pid
        The emulator's process.
    """

    environment: dict[str, str]
    pid: int

    @property
    def rest_url(self) -> str:
        return self.environment["POLARS_CLOUD_API_ADDR"]

    def state(self) -> dict[str, Any]:
        """Manifests, clusters, queries and unmatched calls as the admin API gives them."""
        state: dict[str, Any] = self._ask("GET", "state")
        return state

    def journal(self) -> list[dict[str, Any]]:
        """The latest calls, oldest first."""
        journal: list[dict[str, Any]] = self._ask("GET", "journal")
        return journal

    def reset(self) -> None:
        """Stop every cluster and bring the emulator to the state of its first start."""
        self._ask("POST", "reset")

    def add_fault(self, operation: str, kind: str, **fields: object) -> None:
        """Let something go wrong; the README has the kinds and their fields.

        Parameters
        ----------
        operation
            A gRPC method (``SubmitQuery``) or a REST call (``GET compute/{id}``).

        Raises
        ------
        ValueError
            There is no such fault; with those that there are.
        """
        self._ask("POST", "faults", {"operation": operation, "kind": kind, **fields})

    def clear_faults(self) -> None:
        """Forget the faults that have not come yet, and take the client's secret again."""
        self._ask("DELETE", "faults")

    def add_service_account(self, name: str) -> tuple[str, str]:
        """Let one more service account log in, until the next reset; its client id and secret.

        Parameters
        ----------
        name
            What its client id ends in: lower-case letters, digits and hyphens.

        Raises
        ------
        ValueError
            The name is taken, or of other letters.
        """
        answer = self._ask("POST", "service-accounts", {"name": name})
        return answer["client_id"], answer["client_secret"]

    def advance_clock(self, by: timedelta) -> datetime:
        """Move the time of everything that bills, expires or times out; the new time.

        Access tokens expire, too, and the client does not notice: log in again.
        """
        answer = self._ask("POST", "clock", {"advance_seconds": by.total_seconds()})
        return datetime.fromisoformat(answer["now"])

    def call(self, method: str, path: str, body: dict[str, object] | None = None) -> Any:
        """Call the workspace's REST API past the client, as somebody else would; the answer.

        Parameters
        ----------
        path
            Below the workspace, such as ``query/{id}/cancel``.

        Raises
        ------
        ValueError
            The emulator refuses the call; with its words.
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
    """Run an emulator while the context is open; it ends with this process, however that ends.

    Put its ``environment`` into ``os.environ`` before ``polars_cloud`` is imported for the first
    time: the client reads it then.

    Parameters
    ----------
    state_dir
        Directory in which a restarted emulator finds its state; a temporary one if None.
    realistic
        Whether clusters start, results expire and files are named as on a cloud.
    on_premises
        Whether it is a cluster of a company's own, at ``POLARS_CLUSTER_URI``, in place of a cloud.

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
            # Ctrl-C is for the test suite, which then stops the emulator.
            start_new_session=True,
        ) as process:
            try:
                assert process.stdout is not None
                first_line = process.stdout.readline()
                if not env_file.exists():
                    end = first_line.strip() or f"it ended with exit code {process.wait()}"
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
    """Wait for a condition; its first true value.

    Parameters
    ----------
    seconds
        Until the condition has to hold.
    pause
        Seconds between two looks; more where looking slows down what is waited for.

    Raises
    ------
    AssertionError
        The condition did not hold in time.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        time.sleep(pause)
    return value


@functools.cache  # the certificates of this machine take longer to load than a call takes
def _opener(authority: Path | None) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=authority)),
    )


def _send(request: urllib.request.Request, authority: Path | None = None) -> Any:
    """Send a request past any proxy, and return the JSON of its answer, or None without one."""
    try:
        with _opener(authority).open(request) as answer:
            return json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        raise ValueError(json.load(error)["message"]) from None
