"""What the README tells to type is what CI runs."""

import re

import pytest

from local_airflow import ROOT
from polars_cloud_emulator.testing import RunningEmulator
from tests.failures.table import table

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_every_command_of_the_readme_is_run_by_ci() -> None:
    ci = {name: (ROOT / ".ci" / name).read_text() for name in ("run", "compose")}
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert {"make demo", "make test", "docker compose up"} <= set(commands)
    for command in commands:
        if command.startswith("docker compose "):
            words = ", ".join(f'"{word}"' for word in command.split()[2:])
            assert f"compose({words}" in ci["compose"], command
        else:
            assert re.search(rf"(^|\s){re.escape(command)}$", ci["run"], re.MULTILINE), command


def test_the_python_of_the_readme_runs(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = [block for block in blocks("python") if "import polars" in block]
    for name, value in emulator.environment.items():  # as `. .emulator/env` does
        monkeypatch.setenv(name, value)
    exec(compile(code, "README.md", "exec"), {})
    assert "completed" in capsys.readouterr().out


def test_the_table_of_failures_says_what_is_tested() -> None:
    assert table() in README, f"write this into the README:\n{table()}"
