"""The first script of a worker process, before the emulator's package can be imported.

Its arguments are the descriptor of its connection to the emulator, its folder, and where to import
the emulator's package from. Its variables come on standard input: none of them, a PYTHONPATH for
example, is there when Python starts, and all of them are when Polars does.
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
    # Later readers of standard input find its end, and nothing that comes from the emulator.
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())

    # Before they could find what is installed for the emulator.
    for name in ("cloudpickle", "polars"):
        importlib.import_module(name)

    present = {*sys.modules}
    sys.path += emulator_path
    from polars_cloud_emulator.workers import main as worker
    from polars_cloud_emulator.workers import written_rows

    del sys.path[-len(emulator_path) :]
    hide(sys.modules.keys() - present - {written_rows.NAME})
    worker.serve(socket.socket(fileno=int(connection)), Path(folder))
    os._exit(0)  # nothing of this process is worth the time that Python takes to end


def hide(names: set[str]) -> None:
    """Let no later import find those of the modules that are the emulator's alone."""
    for name in names:
        module = name.partition(".")[0]
        if module not in sys.stdlib_module_names and PathFinder.find_spec(module) is None:
            del sys.modules[name]


if __name__ == "__main__":
    main()
