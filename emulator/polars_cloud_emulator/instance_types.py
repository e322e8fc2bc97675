"""The instance types of AWS, as moto lists them."""

import functools

from moto.utilities.utils import load_resource


@functools.cache
def instance_types() -> frozenset[str]:
    """All names, such as ``m5.large``; read when the first cluster asks for one."""
    return frozenset(load_resource("ec2/resources/instance_types.json"))
