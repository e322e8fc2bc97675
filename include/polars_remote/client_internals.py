"""All that this folder takes from `polars_cloud` and that is not part of its public interface."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import UUID

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, DirectQuery, ExecuteRemote, LazyFrameRemote

Remote = TypeVar("Remote", bound="LazyFrameRemote | ExecuteRemote")

SPEC = {
    # As `ComputeContext` takes it, and where it keeps it.
    "cpus": "cpus",
    "memory": "memory",
    "cpu_architectures": "cpu_architectures",
    "instance_type": "instance_type",
    "storage": "storage",
    "cluster_size": "cluster_size",
    "connection_mode": "connection_mode",
    "env_vars": "env_vars",
    "log_level": "log_level",
    "idle_timeout_mins": "_idle_timeout_mins",
    "requirements": "_requirements_txt",
}


def not_found_error() -> type[Exception]:
    from polars_cloud.polars_cloud import NotFoundError

    return NotFoundError


def misspecified_error() -> type[Exception]:
    from polars_cloud.polars_cloud import ComputeClusterMisspecified

    return ComputeClusterMisspecified


def frontend_domain() -> str:
    from polars_cloud.constants import FRONTEND_DOMAIN

    return FRONTEND_DOMAIN


# Clusters


def get_cluster_id(ctx: ComputeContext) -> str | None:
    """Id of the context's cluster, or None if it was never started."""
    return str(ctx._compute_id) if ctx._compute_id else None


def get_manifest_name(ctx: ComputeContext) -> str | None:
    return ctx._name


def forget_cluster(ctx: ComputeContext) -> None:
    """Let the next `ctx.start()` start a cluster: the client itself refuses after a failure."""
    from polars_cloud import ComputeContextStatus

    ctx._compute_id = ctx._direct_client = None
    ctx._last_known_status = ComputeContextStatus.UNINITIALIZED


def start_without_waiting(ctx: ComputeContext) -> None:
    """Start the cluster of the context's manifest: `ctx.start()` blocks until it is running."""
    from polars_cloud import ComputeContextStatus
    from polars_cloud.constants import API_CLIENT

    name = get_manifest_name(ctx)
    assert name is not None, "each of our clusters has a manifest"
    cluster = API_CLIENT.start_compute_cluster_manifest(workspace_id=ctx.workspace.id, name=name)
    ctx._compute_id = cluster.id
    ctx._last_known_status = ComputeContextStatus.STARTING


def look_at_cluster(cluster_id: str, workspace: str) -> tuple[str, str]:
    """Status of a cluster, such as `STARTING`, and why it has ended; that is empty if it lives."""
    from polars_cloud import ComputeContextStatus, Workspace
    from polars_cloud.constants import API_CLIENT

    cluster = API_CLIENT.get_compute_cluster(Workspace(workspace).id, UUID(cluster_id))
    message = cluster.termination.termination_message if cluster.termination else None
    return ComputeContextStatus._from_api_model(cluster.status).name, message or ""


def get_spec(ctx: ComputeContext) -> dict[str, Any]:
    """What a cluster of this context is, in the words of `ComputeContext`; calls Polars Cloud."""
    from polars_cloud.constants import API_CLIENT

    spec = {
        name: getattr(ctx, attribute) for name, attribute in SPEC.items() if hasattr(ctx, attribute)
    }
    spec["log_level"] = spec["log_level"].as_str()
    if name := get_manifest_name(ctx):  # of which the context keeps no requirements
        manifest = API_CLIENT.get_compute_cluster_manifest(ctx.workspace.id, name)
        spec["requirements"] = manifest.requirements_txt
    return spec


def unregister_manifest(ctx: ComputeContext, name: str) -> None:
    """Remove the manifest, if it is there, from the context's workspace."""
    from polars_cloud.constants import API_CLIENT

    # Another task may have removed it, or this one when the reply was lost.
    with suppress(not_found_error()):
        API_CLIENT.unregister_compute_cluster_manifest(workspace_id=ctx.workspace.id, name=name)


# Queries


def get_query_id(query: DirectQuery) -> str:
    return str(query._query_id)


def get_context(query: DirectQuery) -> ComputeContext:
    return cast("ComputeContext", query._cluster)


def connect_query(query_id: str, ctx: ComputeContext) -> DirectQuery:
    """Take up a query by its id, on the cluster that it was submitted to."""
    from polars_cloud import DirectQuery

    client = ctx._get_direct_client()
    assert client is not None, "only in proxy mode, which has no such queries"
    return DirectQuery(UUID(query_id), client, ctx)


def get_stages(query: DirectQuery) -> tuple[int, int | None]:
    """How many of a query's stages are done, and of how many if that is known yet."""
    details = query._client.get_query_details(query._query_id)
    return len(details.finished_stages), details.total_num_stages


def connect_queries(ctx: ComputeContext) -> Callable[[str], DirectQuery]:
    """Take up queries of a cluster by their ids, with the login of now.

    The client has one login for its whole process. These queries keep theirs, whoever logs in
    later, until it expires.
    """
    from polars_cloud import ClientOptions, DirectQuery, TLSOptions
    from polars_cloud.constants import API_CLIENT
    from polars_cloud.polars_cloud import SchedulerClient

    info = API_CLIENT.get_compute_server_info(ctx.workspace.id, UUID(get_cluster_id(ctx)))
    scheduler, observatory = (
        ClientOptions(
            uri=f"https://{endpoint.address}",
            domain_name=endpoint.tls_server_name,
            extra_headers={"authorization": API_CLIENT.get_auth_header()},
            tls_options=TLSOptions(ca_cert=info.public_server_key.encode()),
        )
        for endpoint in (info.scheduler, info.observatory)
    )
    client = SchedulerClient.without_default_auth(scheduler=scheduler, observatory=observatory)
    return lambda query_id: DirectQuery(UUID(query_id), client, ctx)


def list_queries(ctx: ComputeContext) -> Iterator[tuple[str, str | None]]:
    """Ids and destinations of the queries that were submitted to the context's cluster."""
    from polars_cloud.constants import API_CLIENT

    for query in API_CLIENT.get_queries(ctx.workspace.id):
        if query.cluster_id == ctx._compute_id:
            yield str(query.id), query.output_location


def with_labels(remote: Remote, labels: list[str]) -> Remote:
    """A copy with these labels beside its own: the public `labels` replaces them."""
    labeled = copy.copy(remote)
    labeled._labels = [*(remote._labels or []), *labels]
    return labeled


def get_destination(target: Any) -> str:
    """The URI that a sink writes to: the target itself, or the base path of a `PartitionBy`."""
    return str(target if isinstance(target, str) else target._pl_partition_by.base_path)
