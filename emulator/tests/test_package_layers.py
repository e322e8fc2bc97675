"""The emulator's package has layers: each imports only from itself and from lower layers."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "polars_cloud_emulator"
LAYERS = ["model", "protocol", "storage", "faults", "workers", "planes"]
"""Packages, lowest layer first."""
SHARED = {"clock", "sample_data"}
"""Modules that every layer may import."""


def test_every_package_is_a_layer() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_from_itself_and_lower_layers(layer: str) -> None:
    allowed = {*LAYERS[: LAYERS.index(layer) + 1], *SHARED}
    for path in (PACKAGE / layer).rglob("*.py"):
        source = path.read_text()
        assert {*re.findall(r"polars_cloud_emulator\.(\w+)", source)} <= allowed, path
        assert {*re.findall(r"from polars_cloud_emulator import (\w+)", source)} <= SHARED, path
