"""The emulator as its command line starts it."""

import signal
import subprocess
import sys

from polars_cloud_emulator.testing import RunningEmulator


class Served(RunningEmulator):
    """An emulator that was started from the command line, once it is ready."""

    process: "subprocess.Popen[str]"

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, and what came on standard output after the first line and on error."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "polars_cloud_emulator", "serve", *map(str, options)]
