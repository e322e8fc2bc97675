"""An emulator for a test suite: in a process of its own, on free ports."""

import contextlib
import json
import os
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from polars_cloud_emulator.env_file import read_env_file
from polars_cloud_emulator.isolated_python import python, without_path
from polars_cloud_emulator.journal import ADMIN_PREFIX

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

    def _ask(self, method: str, call: str, body: dict[str, object] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.rest_url}{ADMIN_PREFIX}{call}",
            data=json.dumps(body).encode() if body else None,
            method=method,
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error)["message"]) from None


@contextlib.contextmanager
def running_emulator(state_dir: Path | None = None) -> Iterator[RunningEmulator]:
    """Run an emulator while the context is open; it ends with this process, however that ends.

    Put its ``environment`` into ``os.environ`` before ``polars_cloud`` is imported for the first
    time: the client reads it then.

    Parameters
    ----------
    state_dir
        Directory in which a restarted emulator finds its state; a temporary one if None.

    Raises
    ------
    RuntimeError
        The emulator did not start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        env_file = Path(scratch) / "env"
        command = python("polars_cloud_emulator", "serve", "--parent", os.getpid())
        command += ["--port-base", "0", "--env-file", str(env_file)]
        command += ["--state-dir", str(state_dir or Path(scratch) / "state")]
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
                if not process.stdout.readline():
                    raise RuntimeError(f"the emulator ended with exit code {process.wait()}")
                yield RunningEmulator(read_env_file(env_file), process.pid)
            finally:
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
