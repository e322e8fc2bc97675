"""Cluster specifications: the body of a start or register request, and its check.

The types must decode state of earlier versions of the emulator, too. So limits are not part of the
types; ``check_spec`` checks them.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Annotated, Literal

import msgspec

from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.model.instance_types import instance_types
from polars_cloud_emulator.model.texts import check_labels, check_name, shown

DEFAULT_IDLE_TIMEOUT_MINS = 60
MINIMUM_IDLE_TIMEOUT_MINS = 10
MAX_CLUSTER_SIZE = 100
MAX_STORAGE_GB = 65_536
"""The largest volume of EBS, 64 TiB."""
MAX_REQUIREMENTS_BYTES = 1_000_000
"""Large, because a compiled requirements file has a line for each hash of each package."""
MAX_ENV_VARS_BYTES = 100_000
MAX_VERSION_BYTES = 50
ARCHITECTURES = {"x86_64", "arm64"}
DEFAULT_ARCHITECTURE = "x86_64"


class Version(msgspec.Struct, frozen=True):
    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


class Specs(msgspec.Struct):
    cpus: int
    ram_gb: int
    cpu_architectures: list[str] | None = None
    multiplier: int | None = None


class InstanceType(msgspec.Struct):
    standard: str
    big: str | None = None


class ClusterSpec(msgspec.Struct, kw_only=True):
    """Specification of a cluster."""

    cluster_size: int
    mode: Literal["Direct", "Proxy"]
    python_version: Version
    polars_version: str
    specs: Specs | None = None
    instance_type: InstanceType | None = None
    storage: int | None = None
    big_instance_storage: int | None = None
    labels: list[str] | None = None
    log_level: Literal["Info", "Debug", "Trace"] | None = None
    idle_timeout_mins: Annotated[int, msgspec.Meta(lt=2**31)] | None = None
    requirements_txt: str | None = None
    env_vars: dict[str, str] = {}

    @property
    def vcpus(self) -> int:
        """vCPUs of each node."""
        if self.instance_type is not None:
            return instance_types()[self.instance_type.standard].vcpus
        assert self.specs is not None, "guaranteed by check_spec"
        return self.specs.cpus

    @property
    def idle_timeout(self) -> timedelta:
        minutes = self.idle_timeout_mins
        return timedelta(minutes=DEFAULT_IDLE_TIMEOUT_MINS if minutes is None else minutes)


def check_spec(spec: ClusterSpec) -> None:
    """Check a specification.

    Raises
    ------
    InvalidRequest
        An option has a value that is not possible.
    """
    _check_range(
        "cluster_size",
        spec.cluster_size,
        MAX_CLUSTER_SIZE,
        "the emulator has no more machines",
    )
    if (spec.specs is None) == (spec.instance_type is None):
        raise InvalidRequest("give either cpus and memory or an instance type")
    if spec.specs is not None:
        _check_hardware(spec.specs)
    if spec.instance_type is not None:
        for name in (spec.instance_type.standard, spec.instance_type.big):
            if name is not None and name not in instance_types():
                raise InvalidRequest(f"instance type {shown(name)} does not exist")
    for storage in (spec.storage, spec.big_instance_storage):
        if storage is not None:
            _check_range(
                "storage", storage, MAX_STORAGE_GB, "the largest volume of AWS has this many GB"
            )
    minutes = spec.idle_timeout_mins
    if minutes is not None and minutes < MINIMUM_IDLE_TIMEOUT_MINS:
        raise InvalidRequest(f"idle_timeout_mins must be at least {MINIMUM_IDLE_TIMEOUT_MINS}")
    if not all(0 <= part < 1000 for part in msgspec.structs.astuple(spec.python_version)):
        raise InvalidRequest("each part of python_version must be from 0 to 999")
    check_name(spec.polars_version, "polars_version", MAX_VERSION_BYTES)
    check_labels(spec.labels or [])
    _check_length("requirements", [spec.requirements_txt or ""], MAX_REQUIREMENTS_BYTES)
    _check_length("env_vars", [*spec.env_vars, *spec.env_vars.values()], MAX_ENV_VARS_BYTES)


def _check_hardware(specs: Specs) -> None:
    """Check that some instance type of AWS has at least these resources."""
    wanted = {each.lower() for each in specs.cpu_architectures or [DEFAULT_ARCHITECTURE]}
    if unknown := wanted - ARCHITECTURES:
        raise InvalidRequest(f"cpu_architecture {shown(unknown.pop())} does not exist")
    sizes = [size for size in instance_types().values() if wanted & size.architectures]
    cpus = max(size.vcpus for size in sizes)
    _check_range("cpus", specs.cpus, cpus, "no instance type of AWS has more")
    memory = max(size.ram_mib for size in sizes) // 1024
    _check_range("memory", specs.ram_gb, memory, "no instance type of AWS has more GB")
    if specs.multiplier is not None:
        most = cpus // specs.cpus
        _check_range("multiplier", specs.multiplier, most, "no instance type of AWS has more cpus")


def _check_range(option: str, value: int, most: int, reason: str) -> None:
    if value < 1:
        raise InvalidRequest(f"{option} must be at least 1, not {value}")
    if value > most:
        raise InvalidRequest(f"{option} must be at most {most}, not {value}: {reason}")


def _check_length(option: str, texts: Iterable[str], most: int) -> None:
    if sum(len(text.encode()) for text in texts) > most:
        raise InvalidRequest(f"{option} must have at most {most} bytes")
