"""`make preflight` runs the checks of `preflight.py` with the account in the shell's variables."""

import os
import subprocess
import sys
from pathlib import Path

from local_airflow import ROOT
from polars_cloud_emulator.testing import RunningEmulator


def run_script(
    tmp_path: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts" / "preflight.py"), "--home", str(tmp_path)]
    return subprocess.run(
        [*script, *options],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_script_checks_the_account_that_the_shell_names(
    emulator: RunningEmulator, tmp_path: Path
) -> None:
    secret = emulator.environment["POLARS_CLOUD_CLIENT_SECRET"]
    ran = run_script(tmp_path, "--spend", POLARS_CLOUD_WORKSPACE="nowhere", **emulator.environment)
    *_, workspace, last = ran.stdout.splitlines()
    assert workspace == (
        "Workspace: FAILED: Workspace 'nowhere' does not exist. Set POLARS_CLOUD_WORKSPACE to a "
        "workspace of this account: playground"
    )
    assert last.startswith("failed; ")
    assert ran.returncode == 1
    assert secret not in ran.stdout + (tmp_path / "preflight.log").read_text()
    assert emulator.state()["clusters"] == []


def test_the_script_can_check_an_emulator_whatever_account_the_shell_names(tmp_path: Path) -> None:
    elsewhere = {"POLARS_CLOUD_DATA": "s3://my-bucket/shop", "POLARS_CLOUD_WORKSPACE": "mine"}
    ran = run_script(tmp_path, "--emulator", **elsewhere)
    assert "Data: ok: s3://your-bucket" in ran.stdout
    assert "Nothing was started. With SPEND=1, one node (2 CPUs and 4 GB) is billed" in ran.stdout
    assert ran.returncode == 0
