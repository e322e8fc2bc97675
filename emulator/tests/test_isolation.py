"""The emulator and its workers are isolated from the machine and from their caller."""

import ast
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
from emulator.tests.user_functions import ask_worker
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


def test_script_named_like_a_standard_module_is_not_run_by_the_emulator(tmp_path: Path) -> None:
    for name in ("csv", "json", "asyncio"):
        script = tmp_path / f"{name}.py"
        script.write_text("print('imported', flush=True)")
    script = tmp_path / "csv.py"
    script.write_text(STARTS_ONE.format(then=""))
    ran = subprocess.run(
        [sys.executable, "-P", str(script)],
        # Like a caller whose own folder is on the import path.
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
        eventually(lambda: len(descendants(int(emulator))) >= 2)
        processes = [int(emulator), *descendants(int(emulator))]
        process.send_signal(number)
        process.wait(30)
    eventually(lambda: none_running(processes))


@pytest.mark.parametrize(
    "module",
    [
        *("include", "airflow", "boto3", "moto", "numpy"),
        # Packages of the emulator itself, and others in its environment.
        *("msgspec", "polars_cloud_emulator", "polars_cloud_emulator.model", "polars_cloud"),
        *("packaging", "pip", "google.protobuf"),
    ],
)
def test_user_function_imports_what_a_cluster_has(start_cluster: StartCluster, module: str) -> None:
    def import_it() -> str:
        __import__(module)
        return "imported"

    context = start_cluster()
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{module.partition('.')[0]}'"):
        ask_worker(context, import_it)


def test_program_of_a_user_function_imports_what_a_cluster_has(
    start_cluster: StartCluster,
) -> None:
    def errors() -> object:
        return [
            subprocess.run(
                [program, "-c", f"import {module}"], capture_output=True, text=True
            ).stderr[-40:]
            for program in (sys.executable, "python")
            for module in ("polars", "moto", "msgspec")
        ]

    found = ast.literal_eval(ask_worker(start_cluster(), errors))
    lines = ["", "No module named 'moto'\n", "No module named 'msgspec'\n"] * 2
    assert [error.rpartition(": ")[2] for error in found] == lines


def test_user_function_finds_no_other_distribution_than_a_cluster_has(
    start_cluster: StartCluster,
) -> None:
    def names() -> str:
        import importlib.metadata

        return " ".join(sorted(each.name for each in importlib.metadata.distributions()))

    has = ask_worker(start_cluster(), names).split()
    assert {"cloudpickle", "polars"} <= {*has}
    assert {*has} <= {"cloudpickle", "polars", "polars-runtime-32", "polars-runtime-64", "tzdata"}
    declares = ask_worker(start_cluster(requirements=b"six"), names).split()
    assert {*declares} == {*has, "six"}


@pytest.mark.parametrize("module", ["numpy", "msgspec", "moto"])
def test_user_function_sees_no_module_that_a_cluster_does_not_have(
    start_cluster: StartCluster, module: str
) -> None:
    def look() -> object:
        import importlib.util

        return importlib.util.find_spec(module), module in sys.modules

    assert ask_worker(start_cluster(), look) == "(None, False)"


def test_user_function_imports_of_the_workers_own_what_its_cluster_declares(
    start_cluster: StartCluster,
) -> None:
    def use_it() -> object:
        import msgspec

        return msgspec.json.decode(b"[1]")

    assert ask_worker(start_cluster(requirements=b"msgspec"), use_it) == "[1]"


def test_user_function_imports_what_its_cluster_declares(start_cluster: StartCluster) -> None:
    def use_it() -> str:
        import boto3
        import flask

        return str(boto3.Session().available_profiles) + flask.__name__

    context = start_cluster(requirements=b"# for the lake\nmoto[server]>=1  # any\n\n")
    assert ask_worker(context, use_it) == "[]flask"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("no-such-package==1", "'no-such-package==1' is not met: it is not installed in the emu"),
        ("boto3<1", "'boto3<1' is not met: 1."),
        ("-r more.txt", "'-r more.txt' refers to something that a cluster does not have"),
        ("httpx[brotli]", "is not met: it is not installed in the emulator's environment"),
    ],
)
def test_requirement_that_is_not_met_fails_the_cluster_with_a_clear_error(
    rest: httpx.Client, line: str, expected: str
) -> None:
    started = rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER | {"requirements_txt": line})
    cluster = rest.get(f"{WORKSPACE}/compute/{started.json()['id']}").json()
    assert cluster["status"] == "Failed"
    assert expected in cluster["termination"]["termination_message"]


def test_worker_has_the_variables_that_its_cluster_declares_and_none_of_the_callers(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> str:
        import os

        return " ".join(sorted(os.environ))

    found = ask_worker(start_cluster(env_vars={"SHOP": "1"}), names).split()
    assert "SHOP" in found
    assert not [name for name in found if name.startswith(("AIRFLOW", "POLARS_CLOUD", "PYTEST"))]


def test_variables_of_a_cluster_make_neither_python_nor_the_loader_run_code(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    for name in ("sitecustomize", "usercustomize", "polars", "start"):
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')")
    variables = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONSTARTUP": str(tmp_path / "start.py"),
        "PYTHONHOME": str(tmp_path),
        "PYTHONUSERBASE": str(tmp_path),
        "PYTHONWARNINGS": "error",
        "LD_PRELOAD": str(tmp_path / "none.so"),
        "LD_LIBRARY_PATH": str(tmp_path),
        "BASH_ENV": str(tmp_path / "start.py"),
        "POLARS_MAX_THREADS": "1",
    }
    context = start_cluster(env_vars=variables)
    found = ask_worker(context, lambda: [sys.path, pl.thread_pool_size(), {**os.environ}])
    path, threads, environment = ast.literal_eval(found)
    assert str(tmp_path) not in path
    assert threads == 1, "Polars ignores its variable"
    assert environment | variables == environment
    assert not ran.exists()


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
