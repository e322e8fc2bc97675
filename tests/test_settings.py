"""`settings.py`: each variable has a default, and a wrong value raises a one-sentence error."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from polars_remote import settings
from polars_remote.errors import PolarsRemoteError, SettingsError

REPOSITORY = Path(__file__).parents[1]
VARIABLES = {
    "POLARS_CLOUD_DEFER",
    "POLARS_CLOUD_OUTAGE",
    "POLARS_CLOUD_PORTAL",
    "POLARS_CLOUD_PRICE",
    "POLARS_CLOUD_WORKSPACE",
}
SECONDS = "give seconds, such as 120"
PRICE = "give the price of a vCPU-hour, such as 0.06"
SWITCH = "give one of 1, true, yes, on, 0, false, no, off"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def read_settings() -> ModuleType:
    """Read the variables as a new process does, and leave the imported module unchanged."""
    assert settings.__file__ is not None
    spec = spec_from_file_location(settings.__name__, settings.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_setting_has_a_default() -> None:
    found = read_settings()
    assert found.PORTAL is None
    assert found.WORKSPACE == "playground"
    assert found.OUTAGE_SECONDS == 120.0
    assert found.PRICE is None
    assert found.DEFERS is True


def test_each_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLARS_CLOUD_PORTAL", "http://127.0.0.1:7410")
    monkeypatch.setenv("POLARS_CLOUD_WORKSPACE", "production")
    monkeypatch.setenv("POLARS_CLOUD_OUTAGE", "0.5")
    monkeypatch.setenv("POLARS_CLOUD_DEFER", "0")
    monkeypatch.setenv("POLARS_CLOUD_PRICE", "0.06")
    found = read_settings()
    assert found.PRICE == 0.06
    assert found.PORTAL == "http://127.0.0.1:7410"
    assert found.WORKSPACE == "production"
    assert found.OUTAGE_SECONDS == 0.5
    assert found.DEFERS is False


@pytest.mark.parametrize(
    "change", [str.lower, str.upper, str.title], ids=lambda each: each.__name__
)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", True),
        ("true", True),
        ("yes", True),
        ("on", True),
        ("0", False),
        ("false", False),
        ("no", False),
        ("off", False),
    ],
)
def test_a_switch_is_on_or_off_in_any_case(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: bool, change: Callable[[str], str]
) -> None:
    monkeypatch.setenv("POLARS_CLOUD_DEFER", change(text))
    assert read_settings().DEFERS is expected


@pytest.mark.parametrize("text", ["0", "0.5", "120", "1e3", " 60 "])
def test_an_outage_lasts_any_number_of_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("POLARS_CLOUD_OUTAGE", text)
    assert float(text) == read_settings().OUTAGE_SECONDS


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("POLARS_CLOUD_OUTAGE", "", SECONDS),
        ("POLARS_CLOUD_OUTAGE", "2m", SECONDS),
        ("POLARS_CLOUD_OUTAGE", "-1", SECONDS),
        ("POLARS_CLOUD_OUTAGE", "nan", SECONDS),
        ("POLARS_CLOUD_OUTAGE", "inf", SECONDS),
        ("POLARS_CLOUD_PRICE", "0,06", PRICE),
        ("POLARS_CLOUD_PRICE", "-1", PRICE),
        ("POLARS_CLOUD_PRICE", "nan", PRICE),
        ("POLARS_CLOUD_DEFER", "", SWITCH),
        ("POLARS_CLOUD_DEFER", "maybe", SWITCH),
        ("POLARS_CLOUD_DEFER", "2", SWITCH),
    ],
)
def test_a_wrong_value_is_refused_with_name_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, allowed: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(SettingsError) as refused:
        read_settings()
    assert str(refused.value) == f"{name} is '{text}': {allowed}"


def test_an_empty_workspace_is_refused_with_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POLARS_CLOUD_WORKSPACE", "")
    with pytest.raises(SettingsError) as refused:
        read_settings()
    sentence = "POLARS_CLOUD_WORKSPACE is empty: give a name, such as playground, or unset it"
    assert str(refused.value) == sentence


def test_a_wrong_value_is_this_packages_error_and_a_value_error() -> None:
    assert issubclass(SettingsError, PolarsRemoteError)
    assert issubclass(SettingsError, ValueError)


def test_a_dag_file_shows_the_sentence_as_its_import_error() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "from polars_remote import use_cluster"],
        cwd=REPOSITORY,
        env=os.environ | {"POLARS_CLOUD_OUTAGE": "2m"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = ran.stderr.splitlines()[-1]
    assert last.endswith(f"SettingsError: POLARS_CLOUD_OUTAGE is '2m': {SECONDS}")


def test_these_are_all_variables_that_it_reads() -> None:
    assert settings.__file__ is not None
    source = Path(settings.__file__).read_text()
    words = source.replace('"', " ").split()
    assert {word for word in words if word.startswith("POLARS_CLOUD_")} == VARIABLES
