"""An emulator for a test suite: in a process of its own, on free ports."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polars_cloud_emulator.env_file import read_env_file
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

    def _ask(self, method: str, call: str) -> Any:
        request = urllib.request.Request(f"{self.rest_url}{ADMIN_PREFIX}{call}", method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request) as answer:
            return json.load(answer)


@contextlib.contextmanager
def running_emulator(state_dir: Path | None = None) -> Iterator[RunningEmulator]:
    """Run an emulator while the context is open.

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
        command = [sys.executable, "-m", "polars_cloud_emulator", "serve"]
        command += ["--port-base", "0", "--env-file", str(env_file)]
        command += ["--state-dir", str(state_dir or Path(scratch) / "state")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
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
