"""Each version is the same in all files, and the locks are complete."""

import re
import tomllib
from importlib.metadata import version

import polars
import pytest

from include.preflight import NEWEST_TESTED, OLDEST_PYTHON
from left_to_do import OLDEST_AIRFLOW
from local_airflow import ROOT
from outdated import package, read_lock, read_pins
from polars_cloud_emulator.protocol.client_check import CLIENT_VERSION
from polars_remote.compat.versions import OLDEST

LOCKS = ["requirements.lock", "requirements-dev.lock", ".ci/airflow-3-1.lock"]
LOCKS += [".ci/airflow-3-2.lock"]
PINS = read_pins()
AIRFLOW = PINS["apache-airflow"][0]
CLIENT = PINS["polars-cloud"][0]


def read(file: str) -> str:
    return (ROOT / file).read_text()


def minor(full: str) -> str:
    return full.rpartition(".")[0]


def pythons() -> list[str]:
    """Python versions that the Makefile accepts, newest first."""
    [found] = re.findall(r"^PYTHON_VERSIONS := (.*)", read("Makefile"), re.MULTILINE)
    return str(found).split()


def older_airflows() -> dict[str, str]:
    """Versions of the older Airflows, by group."""
    groups = tomllib.loads(read("pyproject.toml"))["dependency-groups"]
    return {
        name: requirement.removeprefix("apache-airflow==")
        for name, [requirement, *_] in groups.items()
        if name.startswith("airflow-")
    }


def test_the_image_has_the_airflow_that_is_tested_and_a_python_that_it_supports() -> None:
    [image] = re.findall(r"^FROM apache/airflow:(\S+)", read("Dockerfile"), re.MULTILINE)
    airflow, _, python = image.partition("-python")
    assert airflow == AIRFLOW == version("apache-airflow")
    assert python in pythons()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_the_client_that_is_pinned_and_its_polars(lock: str) -> None:
    locked = read_lock(read(lock))
    assert locked["polars-cloud"] == CLIENT == version("polars-cloud")
    assert locked["polars"] == version("polars") == polars.__version__


def test_each_pinned_version_is_the_locks() -> None:
    locked = read_lock(read("requirements-dev.lock"))
    pinned = {package(name): pin for name, (pin, _) in PINS.items()}
    missing = {"pillow", "playwright"}  # for the pictures, installed by .ci/provide
    assert {name: locked.get(name) for name in pinned if name not in missing} == {
        name: pin for name, pin in pinned.items() if name not in missing
    }


def test_each_older_airflow_has_its_lock() -> None:
    [named] = re.findall(r"^OLDER_AIRFLOWS := (.*)", read("Makefile"), re.MULTILINE)
    older = older_airflows()
    assert {f"airflow-{name}" for name in named.split()} == older.keys()
    for name, airflow in older.items():
        assert name == f"airflow-{minor(airflow).replace('.', '-')}"
        assert read_lock(read(f".ci/{name}.lock"))["apache-airflow"] == airflow


def test_every_airflow_from_the_oldest_on_is_tested() -> None:
    tested = sorted({minor(AIRFLOW), *map(minor, older_airflows().values())})
    first, last = OLDEST, tuple(map(int, minor(AIRFLOW).split(".")))
    assert tested == [f"{first[0]}.{number}" for number in range(first[1], last[1] + 1)]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_of_a_lock_has_a_hash(lock: str) -> None:
    entries = re.findall(r"^[a-z0-9-]+==.*\n(?:    .*\n)*", read(lock), re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[a-z0-9-]+==", read(lock), re.MULTILINE))
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_image_installs_by_the_locks_alone() -> None:
    installed = re.findall(r"pip install (?:.*\\\n)*.*", read("Dockerfile"))
    assert len(installed) == 2
    for command in installed:
        assert "--require-hashes" in command
        assert re.search(r"--requirement /opt/airflow/requirements(-dev)?\.lock", command)


def test_the_emulator_speaks_to_the_client_that_is_pinned() -> None:
    assert minor(CLIENT) == CLIENT_VERSION


def test_what_copies_a_dag_knows_the_oldest_airflow() -> None:
    assert ".".join(map(str, OLDEST)) == OLDEST_AIRFLOW


def test_preflight_knows_the_versions_that_are_tested() -> None:
    assert {"Airflow": minor(AIRFLOW), "polars-cloud": minor(CLIENT)} == NEWEST_TESTED
    assert pythons()[-1] == OLDEST_PYTHON
