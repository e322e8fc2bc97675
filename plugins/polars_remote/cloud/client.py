"""Functions that use private names of `polars_cloud`; no other module does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard, cast
from uuid import UUID

from ..errors import ClusterRefusedError, QueryRefusedError

if TYPE_CHECKING:
    from polars_cloud import ComputeContext, DirectQuery, QueryResult, Workspace
    from polars_cloud.polars_cloud import PyLineageContext, QueryInfoPy, SchedulerClient

    QueryInfo = QueryInfoPy

SPEC = {
    # Option of `ComputeContext`: attribute that holds its value.
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

COMPARED_AS_WRITTEN = {
    "cpus",
    "memory",
    "instance_type",
    "storage",
    "cluster_size",
    "env_vars",
    "idle_timeout_mins",
}
"""Options whose value the client does not normalize."""


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
    """Return the id of the context's cluster, or None if no cluster was started.

    The id of a cluster of your own is the URI of its scheduler.
    """
    return str(ctx._compute_id) if ctx._compute_id else None


def get_manifest_name(ctx: ComputeContext) -> str | None:
    return ctx._name


def was_available(ctx: ComputeContext) -> bool:
    """Return whether the cluster accepted queries when its status was last read."""
    return ctx._last_known_status.is_started()  # is_available() also counts STARTING


def forget_cluster(ctx: ComputeContext) -> None:
    """Reset the context. The client refuses to start a cluster after one has failed or stopped."""
    from polars_cloud import ComputeContextStatus

    ctx._compute_id = ctx._direct_client = None
    ctx._last_known_status = ComputeContextStatus.UNINITIALIZED


def start_without_waiting(ctx: ComputeContext) -> None:
    """Start the cluster of the context's manifest. `ctx.start()` would wait until it is running."""
    from polars_cloud import ComputeContextStatus
    from polars_cloud.constants import API_CLIENT

    name = get_manifest_name(ctx)
    assert name is not None, "every cluster of this library has a manifest"
    cluster = API_CLIENT.start_compute_cluster_manifest(workspace_id=ctx.workspace.id, name=name)
    if cluster.id != ctx._compute_id:
        ctx._direct_client = None  # connected to an earlier cluster
    ctx._compute_id = cluster.id
    ctx._last_known_status = ComputeContextStatus.STARTING


def get_cluster_status(cluster_id: str, workspace: Workspace) -> tuple[str, str]:
    """Return a cluster's status, such as `STARTING`, and the reason of its end; empty if none."""
    from polars_cloud import ComputeContextStatus
    from polars_cloud.constants import API_CLIENT

    cluster = API_CLIENT.get_compute_cluster(workspace.id, UUID(cluster_id))
    message = cluster.termination.termination_message if cluster.termination else None
    return ComputeContextStatus._from_api_model(cluster.status).name, message or ""


class ClusterBill(NamedTuple):
    """Times and size of a cluster, according to Polars Cloud.

    Attributes
    ----------
    status
        Status of the cluster, such as `STOPPING`.
    started_at, stopped_at
        Times of the request and of the stop, in seconds since the epoch; None before the stop.
    nodes
        Number of nodes.
    vcpus
        Total vCPUs of all nodes; None if unknown.
    """

    status: str
    started_at: float
    stopped_at: float | None
    nodes: int
    vcpus: int | None


def get_cluster_bill(cluster_id: str, workspace: Workspace) -> ClusterBill:
    from polars_cloud import ComputeContextStatus
    from polars_cloud.constants import API_CLIENT

    cluster = API_CLIENT.get_compute_cluster(workspace.id, UUID(cluster_id))
    status = ComputeContextStatus._from_api_model(cluster.status).name
    # While the cluster is stopping, its termination time is not final.
    termination = cluster.termination if status in ("STOPPED", "FAILED") else None
    per_node = cluster.vcpus or cluster.req_cpu_cores
    has_other_nodes = cluster.big_instance_type or cluster.req_big_instance_multiplier
    return ClusterBill(
        status=status,
        started_at=cluster.request_time.timestamp(),
        stopped_at=termination.termination_time.timestamp() if termination else None,
        nodes=cluster.cluster_size,
        vcpus=per_node * cluster.cluster_size if per_node and not has_other_nodes else None,
    )


def get_size(ctx: ComputeContext) -> tuple[int, int | None]:
    """Return the number of nodes and their total vCPUs; None if only an instance type is known."""
    return ctx.cluster_size, ctx.cpus * ctx.cluster_size if ctx.cpus else None


def get_spec(ctx: ComputeContext) -> dict[str, Any]:
    """Return a cluster's options by name. Makes a call if the context has a manifest."""
    from polars_cloud.constants import API_CLIENT

    spec = {
        name: getattr(ctx, attribute) for name, attribute in SPEC.items() if hasattr(ctx, attribute)
    }
    spec["log_level"] = spec["log_level"].as_str()
    if name := get_manifest_name(ctx):  # the context does not hold the manifest's requirements
        manifest = API_CLIENT.get_compute_cluster_manifest(ctx.workspace.id, name)
        spec["requirements"] = manifest.requirements_txt
    return spec


def get_changes(ctx: ComputeContext, options: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the context's value and the new value of each option that differs, by name.

    All options must be in `COMPARED_AS_WRITTEN`.
    """
    pairs = {name: (getattr(ctx, SPEC[name]), value) for name, value in options.items()}
    return {name: (old, new) for name, (old, new) in pairs.items() if new and old != new}


def unregister_manifest(ctx: ComputeContext, name: str) -> None:
    """Remove the manifest from the context's workspace, if it exists."""
    from polars_cloud.constants import API_CLIENT

    # Another task may have removed it, or an earlier attempt whose reply was lost.
    with suppress(not_found_error()):
        API_CLIENT.unregister_compute_cluster_manifest(workspace_id=ctx.workspace.id, name=name)


# Clusters of your own


@dataclass
class ClusterAccess:
    """Access to clusters of your own, from the extra of a Connection.

    Attributes
    ----------
    ca_cert
        Certificate authority as PEM text; None for the system's authorities.
    headers
        Headers of each call by name, such as `authorization`.
    domain_name
        Name in the cluster's certificate, if the URI has an IP address instead of a name.
    """

    ca_cert: str | None
    headers: dict[str, str] = field(repr=False)
    domain_name: str | None


def connect_own_cluster(uri: str, access: ClusterAccess) -> ComputeContext:
    """Return a `ClusterContext` of the cluster, for use as a `ComputeContext`.

    Raises
    ------
    Exception
        The scheduler is unreachable, or the authority did not issue its certificate.
    """
    from polars_cloud import ClusterContext, TLSOptions

    ca_cert = access.ca_cert
    try:
        ctx = ClusterContext(
            uri,
            domain_name=access.domain_name,
            extra_headers=access.headers,
            tls_options=TLSOptions(ca_cert=ca_cert.encode()) if ca_cert else None,
        )
    except Exception as error:
        # Without a traceback: it would show the headers, local variables of the client.
        failed = error.with_traceback(None)
    else:
        ctx._compute_id = uri  # type: ignore[assignment]  # the client's id is random
        return cast("ComputeContext", ctx)
    raise failed


def is_own_cluster(cluster_id: str) -> bool:
    """Return whether this is the id of a cluster of your own."""
    return "://" in cluster_id


def make_lineage(**fields: Any) -> PyLineageContext:
    """Return a lineage context, as `with_lineage` creates it."""
    from polars_cloud.polars_cloud import PyLineageContext

    return PyLineageContext(**fields)


# Queries


class QueryClient(Protocol):
    """Methods of the client's `SchedulerClient` that contexts and queries call."""

    def do_query(
        self,
        *,
        plan: bytes,
        settings: Any,
        labels: list[str] | None,
        execution_id: str | None,
        lineage_context: Any,
    ) -> UUID: ...

    def get_direct_query_status(self, query_id: UUID) -> Any: ...

    def get_direct_query_result(self, query_id: UUID, timeout_ms: int) -> QueryInfo: ...

    def cancel_direct_query(self, query_id: UUID) -> None: ...


def send_queries_through(client: QueryClient, ctx: ComputeContext) -> None:
    """Make the context send all its queries through this client.

    With polars-cloud 0.12, every way to submit a query on a direct context calls `do_query`:
    sinks, `execute`, `show`, `explain`, `spawn` and `RemoteEngine`. In proxy mode the context
    therefore reports itself as direct. `ctx.start()` does nothing, because `do_query` starts the
    cluster.
    """
    if is_own_cluster(get_cluster_id(ctx) or ""):
        ctx.__class__ = _redirected_own_cluster()
        ctx._redirected_to = client  # type: ignore[attr-defined]
        return
    ctx.__class__ = _redirected_context()
    ctx._redirected_to = client  # type: ignore[attr-defined]
    if not ctx._last_known_status.is_available():
        forget_cluster(ctx)  # after a stop, the context would send no query


_default = ContextVar["ComputeContext | None"]("default", default=None)


@contextmanager
def default_context(ctx: ComputeContext) -> Iterator[None]:
    """Use this context for queries of the block that name none, as in `lf.remote()`.

    The client's own default is not used, because all threads and coroutines share it.
    """
    token = _default.set(ctx)
    try:
        yield
    finally:
        with suppress(ValueError):  # a generator was closed in another context
            _default.reset(token)


def refuse_queries_without_context() -> None:
    """Refuse queries of this process that name no context, except inside `default_context`.

    For each such query, the client would start a cluster that nothing stops.
    """
    from polars_cloud import set_compute_context

    class DefaultContext:
        def __getattribute__(self, name: str) -> Any:
            """Return an attribute of the default context, including `__class__`."""
            ctx = _default.get()
            if ctx is None:
                raise QueryRefusedError(
                    "This query was not submitted, because it names no cluster: write "
                    "lf.remote(ctx), with the context that use_cluster yields"
                )
            return getattr(ctx, name)

    set_compute_context(cast("ComputeContext", DefaultContext()))


@functools.cache
def _redirected_context() -> type[ComputeContext]:
    from polars_cloud import ComputeContext, ComputeContextStatus

    class RedirectedContext(ComputeContext):
        _redirected_to: QueryClient

        @property
        def connection_mode(self) -> str:
            """Return "direct" even in proxy mode, where the client would bypass the recording."""
            return "direct"

        def start(self, *, wait: bool = False) -> None:
            """Do nothing: the first query starts the cluster."""

        def stop(self, **options: Any) -> None:
            """Stop the cluster; the next query starts another one."""
            super().stop(**options)
            self._forget_stop()

        def get_status(self) -> ComputeContextStatus:
            """Return the status of the latest cluster."""
            status = super().get_status()
            if not status.is_available():
                self._forget_stop()
            return status

        def register(self, name: str) -> None:
            """Refuse: the cluster would start under a name that is not recorded."""
            raise ClusterRefusedError(
                f"The manifest {name} was not registered: register() does not work on a context "
                "of use_cluster. Call ensure_manifest instead"
            )

        def unregister(self) -> None:
            """Refuse: the first query needs the manifest to start the cluster."""
            raise ClusterRefusedError(
                f"The manifest {self._name} was not removed, because use_cluster needs it: remove "
                "it after the block, on a ComputeContext of your own"
            )

        def _forget_stop(self) -> None:
            """Reset the status. After a stop, the context would not send the next query."""
            self._last_known_status = ComputeContextStatus.UNINITIALIZED

        def _get_direct_client(self) -> Any:
            return self._redirected_to

    return RedirectedContext


@functools.cache
def _redirected_own_cluster() -> type[ComputeContext]:
    from polars_cloud import ClusterContext, ComputeContextStatus

    class RedirectedCluster(ClusterContext):
        _redirected_to: QueryClient

        def get_status(self) -> ComputeContextStatus:
            """Return IDLE, because this library neither starts nor stops the cluster."""
            return ComputeContextStatus.IDLE

        def _get_direct_client(self) -> Any:
            return self._redirected_to

    return cast("type[ComputeContext]", RedirectedCluster)


class ProxyClient:
    """Query calls in proxy mode, which Polars Cloud forwards to the cluster.

    Replaces the client's own connection to the cluster.
    """

    _ctx: ComputeContext

    def __init__(self, ctx: ComputeContext) -> None:
        self._ctx = ctx

    def do_query(
        self,
        *,
        plan: bytes,
        settings: Any,
        labels: list[str] | None,
        execution_id: str | None,
        lineage_context: Any,
    ) -> UUID:
        """Submit a query and return its id. `execution_id` is dropped: Polars Cloud takes none."""
        from polars_cloud.constants import API_CLIENT

        assert self._ctx._compute_id is not None, "the cluster has been started"
        return API_CLIENT.submit_query(
            self._ctx._compute_id, plan, settings, labels, lineage_context
        )

    def get_direct_query_status(self, query_id: UUID) -> Any:
        from polars_cloud.constants import API_CLIENT

        return API_CLIENT.get_query(self._ctx.workspace.id, query_id).query.status_code

    def get_direct_query_result(self, query_id: UUID, timeout_ms: int) -> QueryInfo:
        """Return the result of a query that has ended. Does not wait; `timeout_ms` is ignored.

        Raises
        ------
        TimeoutError
            The query has not ended.
        """
        from polars_cloud import QueryStatus
        from polars_cloud.constants import API_CLIENT

        status = self.get_direct_query_status(query_id)
        if not QueryStatus._from_api_model(status).is_done():
            raise TimeoutError(f"query {query_id} has not ended")
        return cast("QueryInfo", ProxyResult(API_CLIENT.get_query_result(query_id), status))

    def cancel_direct_query(self, query_id: UUID) -> None:
        from polars_cloud.constants import API_CLIENT

        API_CLIENT.cancel_proxy_query(self._ctx.workspace.id, query_id)

    def __getattr__(self, name: str) -> Any:
        raise QueryRefusedError(
            f"{name} needs a direct connection to the cluster, which proxy mode does not have: use "
            "connection_mode direct"
        )


class ProxyResult:
    """Result of a query in proxy mode, with the status that only direct results have."""

    _result: QueryInfo

    def __init__(self, result: QueryInfo, status: Any) -> None:
        self._result = result
        self.status = status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._result, name)


def uses_proxy(ctx: ComputeContext) -> bool:
    """Return whether the context is in proxy mode: Polars Cloud forwards its queries."""
    return ctx._connection_mode.as_str() == "proxy"


def get_query_client(ctx: ComputeContext) -> SchedulerClient:
    """Return the client's own connection to the context's cluster, or a `ProxyClient`."""
    from polars_cloud import ComputeContext

    if is_own_cluster(get_cluster_id(ctx) or ""):
        return cast("SchedulerClient", ctx._direct_client)
    if uses_proxy(ctx):
        return cast("SchedulerClient", ProxyClient(ctx))
    client = ComputeContext._get_direct_client(ctx)
    assert client is not None, "direct contexts have one"
    return client


def get_client(query: DirectQuery) -> object:
    """Return the client through which the query was submitted."""
    return getattr(query, "_client", None)


def is_query(value: object) -> TypeGuard[DirectQuery]:
    """Return whether the value is a submitted query."""
    from polars_cloud import DirectQuery, ProxyQuery

    return isinstance(value, DirectQuery | ProxyQuery)


def is_result(value: object) -> TypeGuard[QueryResult]:
    from polars_cloud import QueryResult

    return isinstance(value, QueryResult)


def holds_query(value: object) -> bool:
    """Return whether the value is a query or a result, or a list or dict with one in it."""
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return any(map(holds_query, value))
    return is_query(value) or is_result(value)


def get_query_id(query: DirectQuery) -> str:
    return str(query._query_id)


def get_result_info(result: QueryResult) -> QueryInfo:
    """Return the object that `get_direct_query_result` returned for the result."""
    return result.finished_task_info.inner


def get_status_code(query: DirectQuery) -> Any:
    """Return a query's status code, over the client's own connection."""
    return query._client.get_direct_query_status(query._query_id)


def get_context(query: DirectQuery) -> ComputeContext:
    return cast("ComputeContext", query._cluster)


def connect_query(query_id: str, ctx: ComputeContext) -> DirectQuery:
    """Return the query with this id on the context's cluster."""
    from polars_cloud import DirectQuery

    return DirectQuery(UUID(query_id), get_query_client(ctx), ctx)


def get_stages(query: DirectQuery) -> tuple[int, int | None]:
    """Return the number of finished stages, and of all stages, or None if unknown."""
    if uses_proxy(get_context(query)):
        return 0, None
    details = query._client.get_query_details(query._query_id)
    return len(details.finished_stages), details.total_num_stages


def connect_queries(ctx: ComputeContext) -> Callable[[str], DirectQuery]:
    """Return a function that returns a query by its id, connected with the current login.

    The client has one login per process. The returned queries use the current login until it
    expires, even if another account logs in. In proxy mode they use the process's login at the time
    of the call. On a cluster of your own they need no login.
    """
    if uses_proxy(ctx) or is_own_cluster(get_cluster_id(ctx) or ""):
        return lambda query_id: connect_query(query_id, ctx)
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
    """Yield id and destination of each query on the context's cluster.

    A cluster of your own cannot list its queries: nothing is yielded.
    """
    from polars_cloud.constants import API_CLIENT

    if is_own_cluster(get_cluster_id(ctx) or ""):
        return

    for query in API_CLIENT.get_queries(ctx.workspace.id):
        if query.cluster_id == ctx._compute_id:
            yield str(query.id), query.output_location
