"""What the emulator and its workers see of the machine and of whoever started them: nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from emulator.tests.processes import descendants, none_running
from emulator.tests.raw_calls import CLUSTER, WORKSPACE
from polars_cloud_emulator.testing import RunningEmulator, eventually

StartCluster = Callable[..., Any]

STARTS_ONE = """
import time
from polars_cloud_emulator.testing import running_emulator
print("imported", flush=True)
with running_emulator() as emulator:
    print(emulator.pid, flush=True)
    {then}
"""


def ask_worker(context: Any, answer: Callable[[], str]) -> str:
    """What a user's function finds on a worker."""

    def find(_: pl.DataFrame) -> pl.DataFrame:
        return pl.DataFrame({"answer": [answer()]})

    frame = pl.LazyFrame({"answer": [""]}).map_batches(find)
    return str(frame.remote(context).execute().head["answer"].item())


def test_script_named_like_a_standard_module_is_not_run_by_the_emulator(tmp_path: Path) -> None:
    for name in ("csv", "json", "asyncio"):
        script = tmp_path / f"{name}.py"
        script.write_text("print('imported', flush=True)")
    script = tmp_path / "csv.py"
    script.write_text(STARTS_ONE.format(then=""))
    ran = subprocess.run(
        [sys.executable, "-P", str(script)],
        # As a caller whose own folder stands on the path.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout.split()[0] == "imported", ran.stderr
    assert ran.stdout.count("imported") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_emulator_and_its_workers_end_with_the_process_that_started_them(
    tmp_path: Path, number: int
) -> None:
    script = tmp_path / "starts_one.py"
    script.write_text(
        STARTS_ONE.format(
            then="""
    import httpx
    from emulator.tests.raw_calls import CLUSTER, WORKSPACE, rest_client
    with rest_client(emulator.environment) as rest:
        for _ in range(2):
            rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER)
    print("started", flush=True)
    time.sleep(600)
    """
        )
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        _, emulator, _ = (process.stdout.readline() for _ in range(3))
        eventually(lambda: len(descendants(int(emulator))) == 2)
        processes = [int(emulator), *descendants(int(emulator))]
        process.send_signal(number)
        process.wait(30)
    eventually(lambda: none_running(processes))


@pytest.mark.parametrize("module", ["include", "airflow", "boto3", "moto", "numpy"])
def test_user_function_imports_what_a_cluster_has(start_cluster: StartCluster, module: str) -> None:
    def import_it() -> str:
        __import__(module)
        return "imported"

    with pytest.raises(ModuleNotFoundError, match=f"No module named '{module}'"):
        ask_worker(start_cluster(), import_it)


def test_user_function_imports_what_its_cluster_declares(start_cluster: StartCluster) -> None:
    def use_it() -> str:
        import boto3
        import flask

        return str(boto3.Session().available_profiles) + flask.__name__

    context = start_cluster(requirements=b"# for the lake\nmoto[server]>=1  # any\n\n")
    assert ask_worker(context, use_it) == "[]flask"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no-such-package==1", "'no-such-package==1' is not met: it is not installed here"),
        ("boto3<1", "'boto3<1' is not met: 1."),
        ("-r more.txt", "'-r more.txt' names what a cluster does not have"),
        ("httpx[brotli]", "is not met: it is not installed here"),
    ],
)
def test_requirement_that_is_not_met_fails_the_cluster_in_words(
    rest: httpx.Client, line: str, words: str
) -> None:
    started = rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER | {"requirements_txt": line})
    cluster = rest.get(f"{WORKSPACE}/compute/{started.json()['id']}").json()
    assert cluster["status"] == "Failed"
    assert words in cluster["termination"]["termination_message"]


def test_worker_has_the_variables_that_its_cluster_declares_and_none_of_the_callers(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> str:
        import os

        return " ".join(sorted(os.environ))

    found = ask_worker(start_cluster(env_vars={"SHOP": "1"}), names).split()
    assert "SHOP" in found
    assert not [name for name in found if name.startswith(("AIRFLOW", "POLARS_CLOUD", "PYTEST"))]


def test_worker_begins_in_an_empty_folder(start_cluster: StartCluster) -> None:
    def listing() -> str:
        import os

        return " ".join(os.listdir())

    assert ask_worker(start_cluster(), listing) == ""


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_scan_of_a_file_of_the_client_finds_none(
    start_cluster: StartCluster, tmp_path: Path, prefix: str
) -> None:
    path = tmp_path / "mine.parquet"
    pl.DataFrame({"x": [1]}).write_parquet(path)
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        pl.scan_parquet(f"{prefix}{path}").remote(start_cluster()).execute()
    frame = pl.LazyFrame({"x": [1]}).join(pl.scan_parquet(path), on="x")
    with pytest.raises(FileNotFoundError):
        frame.remote(start_cluster()).execute()


def test_emulator_of_a_caller_with_a_path_of_its_own_is_the_same(
    emulator: RunningEmulator,
) -> None:
    with open(f"/proc/{emulator.pid}/environ") as file:
        variables = [line.partition("=")[0] for line in file.read().split("\0")]
    assert "PYTHONPATH" not in variables
