"""The emulator as a whole: starts and stops its parts and its servers."""

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import platform
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import date, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import hypercorn
import hypercorn.asyncio
import polars as pl
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.faults.middleware import FaultMiddleware
from polars_cloud_emulator.faults.pending import Faults
from polars_cloud_emulator.model.errors import CannotPersist, UnknownCall
from polars_cloud_emulator.model.realism import CONVENIENT, Realism
from polars_cloud_emulator.model.specs import ClusterSpec, Specs, Version
from polars_cloud_emulator.model.state import State
from polars_cloud_emulator.model.workspace import CLUSTER_DOMAIN, ORGANIZATION_ID, WORKSPACE_ID
from polars_cloud_emulator.planes.admin import Admin
from polars_cloud_emulator.planes.compute_plane import ComputePlane
from polars_cloud_emulator.planes.control_plane import ControlPlane
from polars_cloud_emulator.planes.pages import Pages
from polars_cloud_emulator.protocol.access_tokens import CLIENT_ID, AccessTokens, ClusterKey
from polars_cloud_emulator.protocol.client_check import ClientCheck
from polars_cloud_emulator.protocol.connections import Connection
from polars_cloud_emulator.protocol.cross_origin import CrossOriginMiddleware
from polars_cloud_emulator.protocol.device_logins import DeviceLogins
from polars_cloud_emulator.protocol.grpc_transport import refusal_for
from polars_cloud_emulator.protocol.journal import Journal, JournalMiddleware
from polars_cloud_emulator.protocol.request_bodies import RequestBodyMiddleware
from polars_cloud_emulator.protocol.tls_listener import TlsListener, TlsOnlyMiddleware
from polars_cloud_emulator.storage.object_store import ObjectStore, OutsideObjectStore
from polars_cloud_emulator.storage.persisted_plans import PersistedPlans
from polars_cloud_emulator.storage.persisted_state import CommitMiddleware, PersistedState
from polars_cloud_emulator.storage.state_directory import StateDirectory
from polars_cloud_emulator.workers.compute import TICK, Compute
from polars_cloud_emulator.workers.pool import processes_that_fit

START_TIMEOUT = 60.0
"""Seconds until a start times out."""
ON_PREMISES = ClusterSpec(
    cluster_size=2,
    mode="Direct",
    python_version=Version(*map(int, platform.python_version_tuple())),
    polars_version=pl.__version__,
    specs=Specs(cpus=2, ram_gb=4),
    idle_timeout_mins=10 * 365 * 24 * 60,
)
"""The on-premises cluster, with an idle timeout of 10 years."""
FULL_DISK_PAUSE = timedelta(minutes=1)
"""Retry interval for sample data that did not fit on the disk."""


class Emulator:
    """A local Polars Cloud in a thread of this process, running while the context is open.

    Three ports: REST and proxy-mode gRPC on plain HTTP; token endpoint, schedulers and observatory
    on TLS; S3, unless an external one is used. A client in this process cannot use the emulator,
    because it holds the GIL while it connects: ``polars_cloud_emulator.testing`` starts an emulator
    in another process.

    Parameters
    ----------
    host
        Name or IPv4 address to listen on, and for clients to use.
    port_base
        First of the three consecutive ports; 0 picks free ports.
    state_dir
        Directory in which a restarted emulator finds its state; a temporary one if None.
    outside_s3
        The ``AWS_*`` variables of an external object store to use instead of the emulator's own.
    clock
        Clock for billing, idle timeouts, start-up and tokens.
    token_lifetime
        Lifetime of an access token.
    realism
        Start-up time of clusters, lifetime of results and names of files.
    on_premises
        Emulate an on-premises cluster at its scheduler's address, without a control plane.

    Raises
    ------
    OSError
        A port is in use.
    UnusableStateDirectory
        The state directory is in use, damaged, owned by another user or not writable.
    CannotPersist
        The sample data cannot be written, for example on a full disk.
    UnusableEnvironment
        ``outside_s3`` does not configure an object store.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port_base: int = 0,
        state_dir: Path | None = None,
        outside_s3: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        token_lifetime: timedelta = timedelta(minutes=5),
        realism: Realism = CONVENIENT,
        on_premises: bool = False,
    ) -> None:
        self.clock = clock or Clock()
        self._host = host
        self._ports = [
            port_base + n if port_base else 0 for n in range(3 if outside_s3 is None else 2)
        ]
        self._state_dir = state_dir
        self._outside_s3 = outside_s3
        self._token_lifetime = token_lifetime
        self._realism = realism
        self._on_premises = on_premises
        self._resources = contextlib.ExitStack()

    @property
    def rest_url(self) -> str:
        return f"http://{self._address(self._rest_listener)}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a client in another process."""
        secret = self._files.client_secret()
        connection = f"http://{CLIENT_ID}:{secret}@"
        own: dict[str, str] = {}
        if self._on_premises:
            authority = self._files.certificate_authority().cert_pem.bytes().decode()
            headers = {"authorization": ClusterKey(secret).authorization}
            extra = {"ca_cert": authority, "headers": headers}
            connection = json.dumps({"conn_type": "http", "extra": extra})
            own["POLARS_CLUSTER_URI"] = f"https://{self._address(self._tls_listener)}"
        return {
            "POLARS_CLOUD_API_ADDR": self.rest_url,
            # Not read by the client, but by code that links to the pages.
            "POLARS_CLOUD_PORTAL": self.rest_url,
            # The client puts "auth." before the domain; with the @ it becomes part of a user name.
            "POLARS_CLOUD_DOMAIN": f"emulator@{self._address(self._tls_listener)}",
            "POLARS_CLOUD_CONFIG_DIR": str(self._files.client_config),
            "POLARS_CLOUD_CLIENT_ID": CLIENT_ID,
            "POLARS_CLOUD_CLIENT_SECRET": secret,
            "AIRFLOW_CONN_POLARS_CLOUD": connection,
            "SSL_CERT_DIR": str(self._files.trusted_certificates),
            "NO_PROXY": f"{self._host},localhost",
            **self._object_store.environment,
            **own,
        }

    def _address(self, listener: socket.socket) -> str:
        return f"{self._host}:{listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as resources:
            self._rest_listener, self._tls_listener, *s3_listeners = (
                resources.enter_context(_listen(self._host, port)) for port in self._ports
            )
            state_dir = self._state_dir or Path(
                resources.enter_context(tempfile.TemporaryDirectory())
            )
            self._files = StateDirectory(state_dir)
            resources.callback(self._files.close)
            self._plans = PersistedPlans(self._files.plans)
            self._persisted = PersistedState(self._files.state, self._plans)
            resources.callback(self._persisted.close)
            self._snapshot = self._persisted.load()
            self._object_store: ObjectStore | OutsideObjectStore
            if self._outside_s3 is None:
                [s3_listener] = s3_listeners
                self._object_store = ObjectStore(
                    s3_listener, self._host, self._files.objects, self._files.object_store_secret()
                )
            else:
                self._object_store = OutsideObjectStore(self._outside_s3, self._files.results)
            resources.callback(self._object_store.close)
            self._serve_in_thread(resources)
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._resources.close()

    def _serve_in_thread(self, resources: contextlib.ExitStack) -> None:
        self._loop = _EventLoop()
        self._stopping = asyncio.Event()
        self._started = concurrent.futures.Future[None]()
        thread = threading.Thread(target=self._run_loop, name="emulator", daemon=True)

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._stopping.set)
            thread.join()

        resources.callback(stop)
        thread.start()
        self._started.result(START_TIMEOUT)

    def _run_loop(self) -> None:
        try:
            # Also ends the connections that hypercorn no longer waits for.
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        authority = self._files.certificate_authority()
        certificate = authority.issue_cert(self._host, "localhost", f"*.{CLUSTER_DOMAIN}")
        self._files.write(
            self._files.server_certificate, certificate.private_key_and_cert_chain_pem.bytes()
        )
        self._state = State(
            self.clock,
            python_version=platform.python_version(),
            polars_version=pl.__version__,
            startup=self._realism.startup,
        )
        self._state.restore(self._snapshot)
        self._compute = Compute(
            self._state,
            self.clock,
            self._persisted,
            plans=self._plans,
            environment=self._object_store.environment,
            temporary_uri=self._object_store.temporary_uri,
            delete_result=self._object_store.delete_result,
            realism=self._realism,
            max_processes=processes_that_fit(),
        )
        self._access_tokens = AccessTokens(
            self.clock, self._files.client_secret(), self._token_lifetime
        )
        self._device_logins = DeviceLogins(self.clock)
        check_authorization: Callable[[str | None], object] = self._access_tokens.check
        if self._on_premises:
            check_authorization = ClusterKey(self._files.client_secret()).check
        check_client = ClientCheck(check_authorization)
        ip, port = self._tls_listener.getsockname()[:2]
        control_plane = ControlPlane(
            self._state,
            self._persisted,
            self._compute,
            self._plans,
            self._access_tokens,
            self._device_logins,
            check_client,
            pages_address=self.rest_url,
            certificate_authority=authority.cert_pem.bytes().decode(),
            # An IP address, because the client accepts no other host name than the TLS name.
            compute_plane_address=f"{ip}:{port}",
        )
        compute_plane = ComputePlane(
            self._state,
            self._compute,
            self._plans,
            check_authorization,
            check_client,
            on_premises=self._on_premises,
        )
        self._journal = Journal(self.clock)
        calls = compute_plane.routes()
        if not self._on_premises:
            calls = [*control_plane.routes(), *calls]
        self._faults = Faults(calls, self._access_tokens)
        admin = Admin(
            self._state,
            self._compute,
            self._journal,
            self._faults,
            self.clock,
            self._access_tokens,
            self._reset,
            self._update_sample_data,
        )
        pages = Pages(
            self._state,
            self._compute,
            self.clock,
            self._access_tokens,
            self._device_logins,
            workspace_id=WORKSPACE_ID,
            organization_id=ORGANIZATION_ID,
        )
        await asyncio.to_thread(self._object_store.load)
        self._sample_data = asyncio.Lock()
        self._sample_data_day: date | None = None
        await self._update_sample_data()
        application = Starlette(
            routes=[
                *pages.routes(),
                *admin.routes(),
                *calls,
                *([] if self._on_premises else control_plane.refusals()),
            ],
            # Starlette raises HTTPException for an unknown path, or an unknown method of a path.
            exception_handlers={HTTPException: functools.partial(_unknown_call, pages)},
            lifespan=self._lifespan,
        )
        application.router.redirect_slashes = False
        await hypercorn.asyncio.serve(
            RequestBodyMiddleware(  # type: ignore[arg-type]
                CrossOriginMiddleware(
                    JournalMiddleware(
                        TlsOnlyMiddleware(
                            FaultMiddleware(
                                CommitMiddleware(application, self._persisted, self._state),
                                self._faults,
                                self._access_tokens,
                            ),
                            port,
                        ),
                        self._journal,
                        self._access_tokens,
                    ),
                    self._host,
                )
            ),
            self._hypercorn_config(),
            shutdown_trigger=self._wait_for_shutdown,
        )

    def _hypercorn_config(self) -> hypercorn.Config:
        config = hypercorn.Config()
        config.bind = [f"fd://{_duplicate(self._tls_listener)}"]
        config.insecure_bind = [f"fd://{_duplicate(self._rest_listener)}"]
        config.certfile = config.keyfile = str(self._files.server_certificate)
        # A client caches its channel, which must survive long pauses and any number of calls.
        config.keep_alive_timeout = timedelta(days=1).total_seconds()
        config.keep_alive_max_requests = sys.maxsize
        config.graceful_timeout = 1.0
        config.loglevel = "WARNING"
        return config

    @contextlib.asynccontextmanager
    async def _lifespan(self, application: Starlette) -> AsyncIterator[None]:
        self._compute.resume()
        self._start_on_premises()
        watches = [
            asyncio.create_task(self._compute.watch_clock()),
            asyncio.create_task(self._update_sample_data_daily()),
        ]
        self._started.set_result(None)
        yield
        for watch in watches:
            watch.cancel()
        await self._compute.close()
        try:
            self._persisted.commit(self._state)
        except CannotPersist as error:
            print(f"{error}. The latest changes are lost.", file=sys.stderr)

    async def _wait_for_shutdown(self) -> None:
        """Wait until the server should stop, and release all waiting calls."""
        await self._stopping.wait()
        self._faults.clear()
        self._compute.release_waiters()

    async def _reset(self) -> None:
        with self._persisted.transaction(self._state):
            self._state.clear()
        await self._compute.reset()
        self._start_on_premises()
        self._journal.entries.clear()
        self._faults.clear()
        self._access_tokens.forget_added_accounts()
        self._device_logins.clear()
        self.clock.reset()
        # Wait for sample data that is being written, else it would be written after the reset.
        async with self._sample_data:
            await asyncio.to_thread(self._object_store.clear, self._last_day())
            await self._write_sample_data()

    def _start_on_premises(self) -> None:
        """Start the on-premises cluster, unless it is running."""
        if self._on_premises and not any(c.is_live for c in self._state.clusters.by_id.values()):
            self._compute.start(lambda: self._state.clusters.start(ON_PREMISES))

    async def _update_sample_data(self) -> None:
        """Write the sample data if the day has changed."""
        async with self._sample_data:
            if self.clock.now().date() != self._sample_data_day:
                await self._write_sample_data()

    async def _write_sample_data(self) -> None:
        """Write the sample data up to tomorrow, so that a run just after midnight finds sales."""
        last_day = self._last_day()
        await asyncio.to_thread(self._object_store.write_sample_data, last_day)
        self._sample_data_day = last_day - timedelta(days=1)

    def _last_day(self) -> date:
        return self.clock.now().date() + timedelta(days=1)

    async def _update_sample_data_daily(self) -> None:
        while True:
            pause = TICK
            try:
                await self._update_sample_data()
            except CannotPersist:
                pause = FULL_DISK_PAUSE
            await asyncio.sleep(pause.total_seconds())


class _EventLoop(asyncio.SelectorEventLoop):
    """An event loop that wraps connections, which hypercorn has no setting for.

    The wrapped connections can be reset, and their errors are logged without what was received.
    """

    async def create_server(
        self, protocol_factory: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> asyncio.Server:
        def connection() -> Connection:
            return Connection(protocol_factory())

        if (context := kwargs.get("ssl")) is not None:
            return cast(asyncio.Server, TlsListener(connection, kwargs["sock"], context))
        return await super().create_server(connection, *args, **kwargs)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # These errors are expected when connections are closed as the emulator stops.
        if isinstance(error, TimeoutError | asyncio.CancelledError):
            return
        if "client_connected_cb" in context["message"]:
            # The traceback would contain the received bytes, and so perhaps a token.
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            problem = "A connection was closed, because its data is not valid HTTP"
            context = {"message": f"{problem} ({type(error).__name__})"}
        super().call_exception_handler(context)


async def _unknown_call(pages: Pages, request: Request, _: Exception) -> Response:
    if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
        return pages.unknown(request.url.path)
    error = UnknownCall(f"the emulator does not support {request.method} {request.url.path}")
    return refusal_for(request, error)


def _listen(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), backlog=128)


def _duplicate(listener: socket.socket) -> int:
    """Return a duplicate file descriptor for hypercorn, which closes its descriptors."""
    return listener.dup().detach()
