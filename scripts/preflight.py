"""Run the DAG `preflight` with the account in the shell's variables, or with an emulator."""

import argparse
import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from local_airflow import ACCOUNT, ROOT, airflow_output_in, use_airflow, use_emulator
from polars_cloud_emulator.testing import running_emulator

KEPT = ("AIRFLOW_CONN_", "POLARS_")
"""Prefixes of the variables with the account and its addresses."""


def main(home: Path, emulator: bool, spend: bool) -> int:
    """Print a line for each step; return 1 if one failed.

    Parameters
    ----------
    home
        AIRFLOW_HOME, which also holds the log.
    emulator
        Whether to check an emulator instead, without the shell's variables.
    spend
        Whether to start a cluster, too.
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    log = home / "preflight.log"
    with contextlib.ExitStack() as stack:
        use_airflow(home)
        if emulator:
            use_emulator(stack.enter_context(running_emulator()).environment)
        else:
            os.environ |= {name: value for name, value in kept.items() if name not in ACCOUNT}
        console = stack.enter_context(airflow_output_in(log))
        subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True)

        from airflow.dag_processing.dagbag import DagBag

        dag_bag = DagBag(ROOT / "dags" / "preflight.py")
        for error in dag_bag.import_errors.values():
            console.print(error, markup=False)
        if "preflight" not in dag_bag.dags:
            return 1
        dag = dag_bag.dags["preflight"]
        steps = logging.getLogger("include.preflight")
        steps.addHandler(Lines(console))
        state = dag.test(run_conf={"spend": spend}).state
        if state == "success" and not spend:
            cost = dag.params.get_param("spend").description
            console.print(f"Nothing was started. With SPEND=1, {cost}")
    console.print(f"{state}; Airflow's log: {log}")
    return 0 if state == "success" else 1


class Lines(logging.Handler):
    """Prints each step's line as it is logged."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), markup=False, soft_wrap=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=ROOT / ".airflow")
    parser.add_argument("--emulator", action="store_true")
    parser.add_argument("--spend", action="store_true")
    sys.exit(main(**vars(parser.parse_args())))
