"""``python -m polars_cloud_emulator serve``: run the emulator until SIGINT or SIGTERM."""

import argparse
import errno
import os
import shlex
import signal
import socket
import threading
from pathlib import Path
from typing import NoReturn

from polars_cloud_emulator.env_file import NotAnEnvFile, write_env_file
from polars_cloud_emulator.model.errors import CannotPersist
from polars_cloud_emulator.model.realism import CONVENIENT, REALISTIC
from polars_cloud_emulator.server import Emulator
from polars_cloud_emulator.storage.object_store import UnusableEnvironment
from polars_cloud_emulator.storage.state_directory import UnusableStateDirectory

DEFAULT_PORT_BASE = 7410
PARENT_CHECK_SECONDS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(prog="polars_cloud_emulator", description=__doc__)
    serve = parser.add_subparsers(required=True, metavar="serve").add_parser("serve")
    serve.add_argument("--host", default="127.0.0.1", help="name or IPv4 address to listen on")
    serve.add_argument(
        "--port-base",
        type=int,
        default=DEFAULT_PORT_BASE,
        help="first of three ports (REST, TLS, the emulator's S3); 0 picks free ports",
    )
    serve.add_argument(
        "--state-dir",
        type=Path,
        help="directory for state, objects, secrets and certificates (default: a temporary one)",
    )
    serve.add_argument(
        "--env-file", type=Path, help="file to write with the environment variables of a client"
    )
    serve.add_argument(
        "--object-store",
        choices=["emulator", "environment"],
        default="emulator",
        help="the emulator's own S3 (default), or the object store of the AWS_* variables",
    )
    serve.add_argument(
        "--realistic",
        action="store_true",
        help="realistic delays and expiry: a cluster starts in 3 minutes, during which the clock "
        "runs fast; results without a destination expire; files in a directory are never replaced",
    )
    serve.add_argument(
        "--on-premises",
        action="store_true",
        help="emulate an on-premises cluster, without a control plane",
    )
    serve.add_argument(
        "--parent", type=int, help="id of the parent process; the emulator ends when it ends"
    )
    options = parser.parse_args()

    own_s3 = options.object_store == "emulator"
    outside_s3 = None if own_s3 else os.environ.copy()
    # Neither the emulator nor its workers use the user's S3 and proxies unless asked to.
    for name in os.environ.copy():
        if name.startswith("AWS_") or (own_s3 and name.lower().endswith("_proxy")):
            del os.environ[name]

    def exit_with_error(message: str) -> NoReturn:
        if options.parent:  # the parent reads the first line
            print(message, flush=True)
        parser.exit(1, f"{parser.prog}: {message}\n")

    # Only this user can read files of the emulator and of its workers.
    os.umask(0o077)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        emulator = Emulator(
            host=options.host,
            port_base=options.port_base,
            state_dir=options.state_dir,
            outside_s3=outside_s3,
            realism=REALISTIC if options.realistic else CONVENIENT,
            on_premises=options.on_premises,
        )
        with emulator:
            ready = "Polars Cloud emulator ready"
            if options.env_file is not None:
                write_env_file(options.env_file, emulator.environment)
                env_file = shlex.quote(str(options.env_file.absolute()))
                ready += f"; in another shell: set -a; . {env_file}; set +a"
            print(f"{ready}\nIts page: {emulator.rest_url}", flush=True)
            while not stop.wait(PARENT_CHECK_SECONDS if options.parent else None):
                if os.getppid() != options.parent:
                    break
    except (UnusableStateDirectory, CannotPersist) as error:
        exit_with_error(str(error))
    except NotAnEnvFile as error:
        exit_with_error(f"--env-file: {error}")
    except UnusableEnvironment as error:
        exit_with_error(f"--object-store environment: {error}")
    except OverflowError as error:
        exit_with_error(f"--port-base {options.port_base}: {error}")
    except OSError as error:
        hint = ""
        if error.errno == errno.EADDRINUSE:
            hint = "; is another emulator running? choose other ports with --port-base"
        elif isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            hint = f"; --host {options.host} must be a name or an IPv4 address of this machine"
        exit_with_error(f"{error}{hint}")


if __name__ == "__main__":
    main()
