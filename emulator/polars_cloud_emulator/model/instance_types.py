"""The instance types of AWS, as moto lists them."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

from moto.utilities.utils import load_resource


class InstanceSize(NamedTuple):
    vcpus: int
    ram_mib: int
    architectures: frozenset[str]


@functools.cache
def instance_types() -> Mapping[str, InstanceSize]:
    """Names, such as ``m5.large``, and sizes; read when the first cluster is to start."""
    return {
        name: InstanceSize(
            each["VCpuInfo"]["DefaultVCpus"],
            each["MemoryInfo"]["SizeInMiB"],
            frozenset(each["ProcessorInfo"]["SupportedArchitectures"]),
        )
        for name, each in load_resource("ec2/resources/instance_types.json").items()
    }
