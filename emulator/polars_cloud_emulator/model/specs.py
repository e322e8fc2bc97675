"""What a cluster may be: the content of a start or a registration, and its check."""

from datetime import timedelta
from typing import Annotated, Literal

import msgspec

from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.model.instance_types import instance_types

DEFAULT_IDLE_TIMEOUT_MINS = 60
MINIMUM_IDLE_TIMEOUT_MINS = 10


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
    """What a cluster is to be; the body of the client's start and register calls."""

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
    def idle_timeout(self) -> timedelta:
        minutes = self.idle_timeout_mins
        return timedelta(minutes=DEFAULT_IDLE_TIMEOUT_MINS if minutes is None else minutes)


def check_spec(spec: ClusterSpec) -> None:
    """Refuse what no cluster can be.

    Raises
    ------
    InvalidRequest
        With the option to change.
    """
    if spec.cluster_size < 1:
        raise InvalidRequest("cluster_size must be at least 1")
    if (spec.specs is None) == (spec.instance_type is None):
        raise InvalidRequest("give either cpus and memory or an instance type")
    if spec.instance_type is not None:
        for name in (spec.instance_type.standard, spec.instance_type.big):
            if name is not None and name not in instance_types():
                raise InvalidRequest(f"instance type '{name}' does not exist")
    if spec.idle_timeout < timedelta(minutes=MINIMUM_IDLE_TIMEOUT_MINS):
        raise InvalidRequest(f"idle_timeout_mins must be at least {MINIMUM_IDLE_TIMEOUT_MINS}")
