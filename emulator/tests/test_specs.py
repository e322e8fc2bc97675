"""Cluster specifications."""

from typing import Any

import pytest

from emulator.tests.states import spec
from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.model.specs import (
    MAX_CLUSTER_SIZE,
    MAX_STORAGE_GB,
    InstanceType,
    Specs,
    Version,
)
from polars_cloud_emulator.model.state import State


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"cluster_size": 0}, "cluster_size must be at least 1, not 0"),
        ({"cluster_size": 101}, "cluster_size must be at most 100, not 101: the emulator has no"),
        ({"cluster_size": 10_000}, "not 10000: the emulator has no more machines"),
        ({"cluster_size": 10**30}, "cluster_size must be at most 100"),
        ({"idle_timeout_mins": 9}, "idle_timeout_mins must be at least 10"),
        ({"idle_timeout_mins": -(10**30)}, "idle_timeout_mins must be at least 10"),
        ({"specs": None}, "give either cpus and memory or an instance type"),
        ({"specs": Specs(0, 4)}, "cpus must be at least 1, not 0"),
        ({"specs": Specs(-2, 4)}, "cpus must be at least 1, not -2"),
        ({"specs": Specs(2, 0)}, "memory must be at least 1, not 0"),
        ({"specs": Specs(100_000, 4)}, "cpus must be at most 896, not 100000"),
        ({"specs": Specs(2, 32_769)}, "memory must be at most 32768, not 32769"),
        (
            {"specs": Specs(2, 4_000, ["Arm64"])},
            "memory must be at most 3072, not 4000: no instance type of AWS has more",
        ),
        (
            {"specs": Specs(2, 4, ["SPARC"])},
            "cpu_architecture 'sparc' does not exist",
        ),
        ({"specs": Specs(2, 4, multiplier=0)}, "multiplier must be at least 1"),
        ({"specs": Specs(448, 4, multiplier=3)}, "multiplier must be at most 2"),
        ({"storage": 0}, "storage must be at least 1, not 0"),
        ({"storage": 10**6}, "storage must be at most 65536, not 1000000"),
        ({"big_instance_storage": -1}, "storage must be at least 1, not -1"),
        (
            {"specs": None, "instance_type": InstanceType("m5.lrge")},
            "type 'm5.lrge' does not exist",
        ),
        ({"specs": None, "instance_type": InstanceType("m" * 10**6)}, "mmm…' does not exist"),
        ({"labels": ["x" * 33]}, "must have from 1 to 32 bytes"),
        ({"labels": ["a\nb"]}, "label 'a\\nb' must not have control characters"),
        ({"labels": [str(number) for number in range(65)]}, "at most 64 labels"),
        ({"requirements_txt": "#" * 1_000_001}, "requirements must have at most 1000000 bytes"),
        ({"env_vars": {"A": "x" * 100_000}}, "env_vars must have at most 100000 bytes"),
        ({"polars_version": "2" * 51}, "polars_version '222"),
        (
            {"python_version": Version(3, 10**30, 0)},
            "each part of python_version must be from 0 to 999",
        ),
        ({"python_version": Version(3, 11, 8)}, "workers run Python 3.11.7, not 3.11.8"),
        ({"polars_version": "2.0.1"}, "workers run Polars 2.0.0, not 2.0.1"),
    ],
)
def test_impossible_specification_is_refused(
    state: State, changed: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        state.clusters.start(spec(**changed))
    assert expected in str(refusal.value)
    assert len(str(refusal.value)) < 300
    assert state.clusters.by_id == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"cluster_size": MAX_CLUSTER_SIZE},
        {"specs": Specs(896, 32_768)},
        {"specs": Specs(192, 3_072, ["Arm64"])},
        {"specs": Specs(192, 4_000, ["X86_64", "Arm64"], multiplier=4)},
        {"storage": 1, "big_instance_storage": MAX_STORAGE_GB},
        {"specs": None, "instance_type": InstanceType("m5.large", "m5.4xlarge")},
        {"labels": ["x" * 32] * 64, "idle_timeout_mins": 10},
    ],
)
def test_cluster_at_the_bounds_starts(state: State, changed: dict[str, Any]) -> None:
    assert state.clusters.start(spec(**changed)).is_live
