"""The instance types of AWS, from moto's list."""

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
    """Return the sizes of instance types by name, such as ``m5.large``."""
    return {
        name: InstanceSize(
            each["VCpuInfo"]["DefaultVCpus"],
            each["MemoryInfo"]["SizeInMiB"],
            frozenset(each["ProcessorInfo"]["SupportedArchitectures"]),
        )
        for name, each in load_resource("ec2/resources/instance_types.json").items()
    }
