"""Entry point of a worker process.

Arguments: the file descriptor of the connection to the emulator, the worker's folder, and the
import paths of the emulator's package. The environment variables are read from standard input after
Python has started, so that a PYTHONPATH has no effect, and before Polars is imported, so that the
variables of Polars have.
"""

import importlib
import json
import os
import socket
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def main() -> None:
    connection, folder, *emulator_path = sys.argv[1:]
    os.environ.update(json.load(sys.stdin))
    # Later readers of standard input get end of file.
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())

    # Imported before the emulator's own packages are on the import path.
    for name in ("cloudpickle", "polars"):
        importlib.import_module(name)

    present = {*sys.modules}
    sys.path += emulator_path
    from polars_cloud_emulator.workers import main as worker
    from polars_cloud_emulator.workers import written_rows

    del sys.path[-len(emulator_path) :]
    hide(sys.modules.keys() - present - {written_rows.NAME})
    worker.serve(socket.socket(fileno=int(connection)), Path(folder))
    os._exit(0)  # skips the finalization of Python, which takes time


def hide(names: set[str]) -> None:
    """Remove the emulator's own modules, so that later imports do not find them."""
    for name in names:
        module = name.partition(".")[0]
        if module not in sys.stdlib_module_names and PathFinder.find_spec(module) is None:
            del sys.modules[name]


if __name__ == "__main__":
    main()
