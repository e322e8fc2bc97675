"""The emulator's package has rooms, and what a room imports lies below it."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "polars_cloud_emulator"
ROOMS = ["model", "protocol", "storage", "faults", "workers", "planes"]
"""From the ground up."""
SHARED = {"clock", "sample_data"}
"""Modules beside the rooms that every room may import."""


def test_each_folder_with_modules_is_a_room_of_the_list() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_itself_and_from_those_below(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1], *SHARED}
    for path in (PACKAGE / room).rglob("*.py"):
        source = path.read_text()
        assert {*re.findall(r"polars_cloud_emulator\.(\w+)", source)} <= allowed, path
        assert {*re.findall(r"from polars_cloud_emulator import (\w+)", source)} <= SHARED, path
