"""The emulator's fixtures in another test suite."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "emulator" / "examples" / "test_queries.py"
BEFORE = """
import polars_cloud

def test_first(polars_cloud_emulator):
    pass
"""
TWO_TESTS = """
import polars as pl

def count_clusters(emulator):
    return len(emulator.state()["clusters"])

def test_starts_a_cluster(polars_cloud_emulator):
    import polars_cloud as pc
    pc.ComputeContext(workspace="playground", cpus=2, memory=4).start()
    polars_cloud_emulator.add_fault("SubmitQuery", "worker_killed")
    assert count_clusters(polars_cloud_emulator) == 1

def test_finds_none(polars_cloud_emulator):
    assert count_clusters(polars_cloud_emulator) == 0
    assert polars_cloud_emulator.state()["faults"] == []
"""
NONE = """
import sys

def test_nothing(request):
    assert "polars_cloud_emulator.testing" not in sys.modules
    assert "polars" not in sys.modules
"""


def run_pytest(folder: Path, content: str) -> "subprocess.CompletedProcess[str]":
    (folder / "test_theirs.py").write_text(content)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", folder]
    plugins = [
        "-p",
        "polars_cloud_emulator.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    return subprocess.run(
        [*command, *plugins, folder / "test_theirs.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "emulator")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(EXAMPLE.read_text(), "3 passed", id="the example"),
        pytest.param(TWO_TESTS, "2 passed", id="reset after each test"),
        pytest.param(NONE, "1 passed", id="not started unless requested"),
        pytest.param(BEFORE, "import it in your tests and functions", id="imported too early"),
    ],
)
def test_fixtures_work_in_a_test_suite(tmp_path: Path, content: str, expected: str) -> None:
    ran = run_pytest(tmp_path, content)
    assert expected in ran.stdout, ran.stdout + ran.stderr


def test_readme_shows_the_example() -> None:
    readme = (ROOT / "emulator" / "README.md").read_text()
    assert f"```python\n{EXAMPLE.read_text()}```" in readme


def test_distribution_takes_the_versions_that_the_repository_pins() -> None:
    own = tomllib.loads((ROOT / "emulator" / "pyproject.toml").read_text())["project"]
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["emulator"]
    lines = [
        *pinned,
        *(
            line
            for line in (ROOT / "requirements.txt").read_text().splitlines()
            if line.startswith("polars-cloud")
        ),
    ]
    pins = {pin.name: next(iter(pin.specifier)).version for pin in map(Requirement, lines)}
    ranges = {each.name: each.specifier for each in map(Requirement, own["dependencies"])}
    assert ranges.keys() == pins.keys()
    for name, version in pins.items():
        assert ranges[name].contains(version), name
