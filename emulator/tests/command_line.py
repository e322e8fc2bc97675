"""The emulator, started from its command line."""

import signal
import subprocess
import sys

from polars_cloud_emulator.testing import RunningEmulator


class Served(RunningEmulator):
    """A ready emulator that was started from the command line."""

    process: "subprocess.Popen[str]"

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal; return exit code, standard output after its first line, and stderr."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "polars_cloud_emulator", "serve", *map(str, options)]
