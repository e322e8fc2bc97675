"""Manifests: registered once, drift detected, one live cluster each."""

import platform
from collections.abc import Callable
from types import ModuleType
from typing import Any

import httpx
import polars as pl
import pytest

from emulator.tests.raw_calls import CLUSTER, WORKSPACE
from polars_cloud_emulator.testing import RunningEmulator

NAME = "airflow-production"


@pytest.fixture
def register(pc: ModuleType) -> Callable[..., Any]:
    def register(**specs: Any) -> Any:
        context = pc.ComputeContext(workspace="playground", cpus=2, memory=4, **specs)
        context.register(NAME)
        return context

    return register


def named(pc: ModuleType) -> Any:
    return pc.ComputeContext(workspace="playground", name=NAME)


def test_unknown_manifest_is_not_found_with_what_to_do(pc: ModuleType) -> None:
    from polars_cloud.polars_cloud import NotFoundError

    with pytest.raises(NotFoundError, match=f"'{NAME}' does not exist; register it first"):
        named(pc)


def test_registered_manifest_is_found_with_its_specs_and_versions(
    pc: ModuleType, rest: httpx.Client, register: Callable[..., Any]
) -> None:
    register(cluster_size=2, idle_timeout_mins=15, env_vars={"SHOP": "1"}, requirements=b"numpy")
    context = named(pc)
    assert (context.cpus, context.memory, context.cluster_size) == (2, 4, 2)
    assert context.env_vars == {"SHOP": "1"}
    assert context.get_status() is pc.ComputeContextStatus.UNINITIALIZED
    manifest = rest.get(f"{WORKSPACE}/manifest/find", params={"name": NAME}).json()
    assert manifest["polars_version"] == pl.__version__
    assert manifest["python_version"] == platform.python_version()
    assert manifest["idle_timeout_mins"] == 15
    assert manifest["requirements_txt"] == "numpy"
    assert manifest["live_cluster_id"] is None


def test_two_starts_of_a_manifest_give_one_live_cluster(
    emulator: RunningEmulator, pc: ModuleType, register: Callable[..., Any]
) -> None:
    register()
    first, second = named(pc), named(pc)
    first.start()
    second.start()
    third = named(pc)
    assert first._compute_id == second._compute_id == third._compute_id
    [cluster] = emulator.state()["clusters"]
    assert cluster["manifest"] == NAME

    third.stop()
    fourth = named(pc)
    assert fourth._compute_id is None
    fourth.start()
    assert fourth._compute_id != first._compute_id


def test_registering_a_name_twice_is_refused(register: Callable[..., Any]) -> None:
    register()
    with pytest.raises(ValueError, match="exists; unregister it before you register it again"):
        register()


@pytest.mark.parametrize(
    "name", ["", " a", "a ", "a\nb", "a\tb", "x" * 256, "a&b", "a#b", "a%b", "a+b"]
)
def test_name_by_which_the_client_would_not_find_it_again_is_refused(
    pc: ModuleType, emulator: RunningEmulator, name: str
) -> None:
    context = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    with pytest.raises(ValueError, match=r"the name of a manifest|cannot name a manifest"):
        context.register(name)
    assert emulator.state()["manifests"] == []


@pytest.mark.parametrize("name", ["a b", "ä€", "a/b?c=d;e", "<'\"\\{}|^`", "x" * 255])
def test_other_names_are_found_again(pc: ModuleType, name: str) -> None:
    pc.ComputeContext(workspace="playground", cpus=2, memory=4).register(name)
    assert pc.ComputeContext(workspace="playground", name=name).cpus == 2


def test_unregistered_name_is_free_and_its_cluster_runs_on(
    emulator: RunningEmulator, pc: ModuleType, register: Callable[..., Any]
) -> None:
    from polars_cloud.polars_cloud import NotFoundError

    context = register()
    context.start()
    named(pc).unregister()
    with pytest.raises(NotFoundError):
        named(pc)
    assert emulator.state()["manifests"] == []
    assert context.get_status() is pc.ComputeContextStatus.IDLE
    register()
    assert named(pc)._compute_id is None


@pytest.mark.parametrize(
    ("drift", "expected"),
    [
        ({"python_version": {"major": 3, "minor": 10, "patch": 4}}, r"python version.*3\.10\.4"),
        ({"polars_version": "1.44.2"}, r"polars version.*1\.44\.2"),
    ],
)
def test_manifest_of_another_version_is_stored_and_refused_by_the_client(
    pc: ModuleType, rest: httpx.Client, drift: dict[str, Any], expected: str
) -> None:
    from polars_cloud.polars_cloud import ComputeClusterMisspecified

    body = CLUSTER | {"name": NAME} | drift
    assert rest.post(f"{WORKSPACE}/manifest", json=body).status_code == 200
    with pytest.raises(ComputeClusterMisspecified, match=expected):
        named(pc)
    assert rest.post(f"{WORKSPACE}/manifest/start", json=body).status_code == 400
