"""`include/manifests.py`: the manifest is there, and fits this worker."""

import platform
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from include.manifests import ensure_manifest
from polars_cloud_emulator.testing import RunningEmulator
from tests.emulator.raw_calls import CLUSTER, WORKSPACE, rest_client

SPEC = {"cpus": 2, "memory": 4, "idle_timeout_mins": 10}


def registered(emulator: RunningEmulator) -> dict[str, Any]:
    with rest_client(emulator.environment) as rest:
        manifest: dict[str, Any] = rest.get(f"{WORKSPACE}/manifest/find?name=shop").json()
        return manifest


def calls(emulator: RunningEmulator, method: str) -> int:
    return sum(
        call["path"].endswith("/manifest") and call["method"] == method
        for call in emulator.journal()
    )


def test_an_absent_manifest_is_registered(pc: ModuleType, emulator: RunningEmulator) -> None:
    ensure_manifest("shop", **SPEC)
    assert registered(emulator)["idle_timeout_mins"] == 10
    assert pc.ComputeContext(name="shop", workspace="playground").cpus == 2


def test_a_fitting_manifest_is_left_alone(pc: ModuleType, emulator: RunningEmulator) -> None:
    ensure_manifest("shop", **SPEC)
    before = registered(emulator)
    ensure_manifest("shop", **SPEC)
    assert registered(emulator)["id"] == before["id"]
    assert calls(emulator, "POST") == 1


@pytest.mark.parametrize(
    "drift",
    [
        {"polars_version": "1.41.2"},
        {"python_version": {"major": 3, "minor": 9, "patch": 1}},
    ],
)
def test_a_manifest_of_other_versions_is_registered_anew(
    pc: ModuleType, emulator: RunningEmulator, drift: dict[str, Any]
) -> None:
    with rest_client(emulator.environment) as rest:
        rest.post(
            f"{WORKSPACE}/manifest", json={**CLUSTER, **drift, "name": "shop"}
        ).raise_for_status()
    ensure_manifest("shop", **SPEC)
    healed = registered(emulator)
    assert healed["polars_version"] == pl.__version__
    assert healed["python_version"] == platform.python_version()


@pytest.mark.parametrize("operation", ["GET manifest/find", "POST manifest"])
@pytest.mark.parametrize(
    "fault", [{"kind": "http_error", "status": 503}, {"kind": "answer_lost"}], ids=["503", "lost"]
)
def test_an_outage_is_survived(
    pc: ModuleType, emulator: RunningEmulator, operation: str, fault: dict[str, Any]
) -> None:
    emulator.add_fault(operation, **fault)
    ensure_manifest("shop", **SPEC)
    assert registered(emulator)["name"] == "shop"
    assert calls(emulator, "DELETE") == 0


def test_registering_at_the_same_time_is_no_error(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    with ThreadPoolExecutor() as tasks:
        for done in [tasks.submit(ensure_manifest, "shop", **SPEC) for _ in range(4)]:
            done.result()
    assert registered(emulator)["name"] == "shop"
    assert calls(emulator, "DELETE") == 0


def test_a_refused_spec_is_an_error_in_the_words_of_polars_cloud(pc: ModuleType) -> None:
    with pytest.raises(ValueError, match="idle_timeout_mins must be at least 10"):
        ensure_manifest("shop", cpus=2, memory=4, idle_timeout_mins=5)
