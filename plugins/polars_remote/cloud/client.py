"""Private names of `polars_cloud`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
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
    # Option of `ComputeContext`: attribute that keeps it.
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
"""Options that the client does not normalize."""


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
    """Return the id of the context's cluster, or None if it was never started.

    The id of a cluster of your own is the URI of its scheduler.
    """
    return str(ctx._compute_id) if ctx._compute_id else None


def get_manifest_name(ctx: ComputeContext) -> str | None:
    return ctx._name


def was_available(ctx: ComputeContext) -> bool:
    """Return whether the cluster accepted queries when its status was last read."""
    return ctx._last_known_status.is_started()  # is_available() also counts STARTING


def forget_cluster(ctx: ComputeContext) -> None:
    """Allow the next start: the client refuses to start after a cluster has failed or stopped."""
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
    if cluster.id != ctx._compute_id:
        ctx._direct_client = None  # is connected to an earlier cluster
    ctx._compute_id = cluster.id
    ctx._last_known_status = ComputeContextStatus.STARTING


def get_cluster_status(cluster_id: str, workspace: Workspace) -> tuple[str, str]:
    """Return a cluster's status, such as `STARTING`, and why it ended; empty if it is live."""
    from polars_cloud import ComputeContextStatus
    from polars_cloud.constants import API_CLIENT

    cluster = API_CLIENT.get_compute_cluster(workspace.id, UUID(cluster_id))
    message = cluster.termination.termination_message if cluster.termination else None
    return ComputeContextStatus._from_api_model(cluster.status).name, message or ""


class ClusterBill(NamedTuple):
    """What Polars Cloud says about a cluster's time and size.

    Attributes
    ----------
    status
        Such as `STOPPING`.
    started_at, stopped_at
        When it was requested and when it stopped, in seconds since the epoch; None if unknown.
    vcpus
        vCPUs of all nodes; None if unknown.
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
    # While it is stopping, the time of its end is not the last one.
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
    """Return the number of nodes, and the vCPUs of all; None if only an instance type is known."""
    return ctx.cluster_size, ctx.cpus * ctx.cluster_size if ctx.cpus else None


def get_spec(ctx: ComputeContext) -> dict[str, Any]:
    """Return a cluster's options by their names; one call if the context has a manifest."""
    from polars_cloud.constants import API_CLIENT

    spec = {
        name: getattr(ctx, attribute) for name, attribute in SPEC.items() if hasattr(ctx, attribute)
    }
    spec["log_level"] = spec["log_level"].as_str()
    if name := get_manifest_name(ctx):  # the context keeps no requirements of it
        manifest = API_CLIENT.get_compute_cluster_manifest(ctx.workspace.id, name)
        spec["requirements"] = manifest.requirements_txt
    return spec


def get_changes(ctx: ComputeContext, options: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the old and new value of each option that differs from the context's, by name.

    The options are in `COMPARED_AS_WRITTEN`.
    """
    pairs = {name: (getattr(ctx, SPEC[name]), value) for name, value in options.items()}
    return {name: (old, new) for name, (old, new) in pairs.items() if new and old != new}


def unregister_manifest(ctx: ComputeContext, name: str) -> None:
    """Remove the manifest, if it is there, from the context's workspace."""
    from polars_cloud.constants import API_CLIENT

    # Another task may have removed it, or this one when the reply was lost.
    with suppress(not_found_error()):
        API_CLIENT.unregister_compute_cluster_manifest(workspace_id=ctx.workspace.id, name=name)


# Clusters of your own


@dataclass
class ClusterAccess:
    """How to reach clusters of your own, from the extra of a Connection.

    Attributes
    ----------
    ca_cert
        Certificate authority in PEM; None: those of the system.
    headers
        Headers of each call, such as `authorization`.
    domain_name
        Name in the cluster's certificate, if its URI has an address in place of a name.
    """

    ca_cert: str | None
    headers: dict[str, str] = field(repr=False)
    domain_name: str | None


def connect_own_cluster(uri: str, access: ClusterAccess) -> ComputeContext:
    """Return a context of the cluster, which stands in for a `ComputeContext`.

    Raises
    ------
    Exception
        The scheduler cannot be reached, or its certificate is not one of the authority's.
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
        # A traceback shows local variables, and the client's frames hold the headers.
        failed = error.with_traceback(None)
    else:
        ctx._compute_id = uri  # type: ignore[assignment]  # the client's is a random one
        return cast("ComputeContext", ctx)
    raise failed


def is_own_cluster(cluster_id: str) -> bool:
    """Return whether this is the id of a cluster of your own."""
    return "://" in cluster_id


def make_lineage(**fields: Any) -> PyLineageContext:
    """Return what `with_lineage` makes."""
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

    With polars-cloud 0.12, each route of a query on a direct context ends in `do_query`: sinks,
    `execute`, `show`, `explain`, `spawn` and `RemoteEngine`. The context calls itself direct in
    proxy mode, too. `ctx.start()` does nothing then: the client's `do_query` starts the cluster.
    """
    if is_own_cluster(get_cluster_id(ctx) or ""):
        ctx.__class__ = _redirected_own_cluster()
        ctx._redirected_to = client  # type: ignore[attr-defined]
        return
    ctx.__class__ = _redirected_context()
    ctx._redirected_to = client  # type: ignore[attr-defined]
    if not ctx._last_known_status.is_available():
        forget_cluster(ctx)  # the client sends no query after a stop


_default = ContextVar["ComputeContext | None"]("default", default=None)


@contextmanager
def default_context(ctx: ComputeContext) -> Iterator[None]:
    """Let queries of the body that name no context, as in `lf.remote()`, use this one.

    All threads and coroutines share the client's own default.
    """
    token = _default.set(ctx)
    try:
        yield
    finally:
        with suppress(ValueError):  # a generator that is closed elsewhere
            _default.reset(token)


def refuse_queries_without_context() -> None:
    """Refuse queries of this process that name no context, outside of `default_context`.

    For each, the client would start a cluster that nobody stops.
    """
    from polars_cloud import set_compute_context

    class DefaultContext:
        def __getattribute__(self, name: str) -> Any:
            """Return the attribute of the default context, its class among them."""
            ctx = _default.get()
            if ctx is None:
                raise QueryRefusedError(
                    "This query was not submitted, because it names no cluster: write "
                    "lf.remote(ctx), with the context that use_cluster gives"
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
            """Direct, in proxy mode, too: else the client would pass the recording by."""
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
            """Refuse: the cluster would start under a name that is not on record."""
            raise ClusterRefusedError(
                f"The manifest {name} was not registered on a context of use_cluster: call "
                "ensure_manifest"
            )

        def unregister(self) -> None:
            """Refuse: the first query starts the cluster by its manifest."""
            raise ClusterRefusedError(
                f"The manifest {self._name} was not removed, because use_cluster uses it: remove "
                "it after the block, on a context of your own"
            )

        def _forget_stop(self) -> None:
            """Forget the stop: the client would not send the next query."""
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
            """Return IDLE: nobody starts or stops the cluster here."""
            return ComputeContextStatus.IDLE

        def _get_direct_client(self) -> Any:
            return self._redirected_to

    return cast("type[ComputeContext]", RedirectedCluster)


class ProxyClient:
    """Calls about the queries of a cluster in proxy mode, which Polars Cloud passes on.

    Stands in for the client's own connection to a cluster.
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
        """Submit a query; Polars Cloud has no place for `execution_id`, a notebook's cell."""
        from polars_cloud.constants import API_CLIENT

        assert self._ctx._compute_id is not None, "it was started, or is running"
        return API_CLIENT.submit_query(
            self._ctx._compute_id, plan, settings, labels, lineage_context
        )

    def get_direct_query_status(self, query_id: UUID) -> Any:
        from polars_cloud.constants import API_CLIENT

        return API_CLIENT.get_query(self._ctx.workspace.id, query_id).query.status_code

    def get_direct_query_result(self, query_id: UUID, timeout_ms: int) -> QueryInfo:
        """Return the result of a query that has ended: no call is held until then.

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
            f"{name} needs a connection to the cluster, which there is none of in proxy mode: use "
            "connection_mode direct"
        )


class ProxyResult:
    """Result of a query in proxy mode, with its status, which only a direct one has."""

    _result: QueryInfo

    def __init__(self, result: QueryInfo, status: Any) -> None:
        self._result = result
        self.status = status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._result, name)


def uses_proxy(ctx: ComputeContext) -> bool:
    """Return whether Polars Cloud passes the context's queries on."""
    return ctx._connection_mode.as_str() == "proxy"


def get_query_client(ctx: ComputeContext) -> SchedulerClient:
    """Return the client's own connection to the context's cluster, or what stands in for it."""
    from polars_cloud import ComputeContext

    if is_own_cluster(get_cluster_id(ctx) or ""):
        return cast("SchedulerClient", ctx._direct_client)
    if uses_proxy(ctx):
        return cast("SchedulerClient", ProxyClient(ctx))
    client = ComputeContext._get_direct_client(ctx)
    assert client is not None, "the mode is direct"
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


def get_query_id(query: DirectQuery) -> str:
    return str(query._query_id)


def get_result_info(result: QueryResult) -> QueryInfo:
    """Return what the client's `get_direct_query_result` gave for the result."""
    return result.finished_task_info.inner


def get_status_code(query: DirectQuery) -> Any:
    """Return the status of a query as the client's own connection gives it."""
    return query._client.get_direct_query_status(query._query_id)


def get_context(query: DirectQuery) -> ComputeContext:
    return cast("ComputeContext", query._cluster)


def connect_query(query_id: str, ctx: ComputeContext) -> DirectQuery:
    """Connect to a query by its id, on the cluster that it was submitted to."""
    from polars_cloud import DirectQuery

    return DirectQuery(UUID(query_id), get_query_client(ctx), ctx)


def get_stages(query: DirectQuery) -> tuple[int, int | None]:
    """Return the number of finished stages, and the total if it is known."""
    if uses_proxy(get_context(query)):
        return 0, None
    details = query._client.get_query_details(query._query_id)
    return len(details.finished_stages), details.total_num_stages


def connect_queries(ctx: ComputeContext) -> Callable[[str], DirectQuery]:
    """Return a function that connects to the cluster's queries with the current login.

    The client has one login per process. These queries keep their login until it expires, even if
    another account logs in. Those in proxy mode do not; those of a cluster of your own need none.
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
    """Yield id and destination of each query that was submitted to the context's cluster.

    A cluster of your own lists none.
    """
    from polars_cloud.constants import API_CLIENT

    if is_own_cluster(get_cluster_id(ctx) or ""):
        return

    for query in API_CLIENT.get_queries(ctx.workspace.id):
        if query.cluster_id == ctx._compute_id:
            yield str(query.id), query.output_location
