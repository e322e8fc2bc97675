"""Manifests: registered names, each with a cluster specification."""

from uuid import UUID, uuid4

import msgspec

from polars_cloud_emulator.model.errors import Conflict, InvalidRequest, NotFound
from polars_cloud_emulator.model.specs import ClusterSpec, check_spec
from polars_cloud_emulator.model.texts import check_name, shown

MAX_NAME_BYTES = 255


class Manifest(msgspec.Struct):
    name: str
    spec: ClusterSpec
    id: UUID


class Manifests:
    """The manifests of a workspace, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Manifest] = {}

    def register(self, name: str, spec: ClusterSpec) -> Manifest:
        check_name(name, "the name of a manifest", MAX_NAME_BYTES)
        if set(name) & set("&#%+"):
            raise InvalidRequest(
                f"{shown(name)} cannot name a manifest: the client puts the name into a URL "
                "without escaping '&', '#', '%' and '+'"
            )
        if name in self.by_name:
            raise Conflict(f"manifest '{name}' exists; unregister it before you register it again")
        check_spec(spec)
        self.by_name[name] = Manifest(name, spec, uuid4())
        return self.by_name[name]

    def find(self, name: str) -> Manifest:
        try:
            return self.by_name[name]
        except KeyError:
            raise NotFound(f"manifest {shown(name)} does not exist; register it first") from None
