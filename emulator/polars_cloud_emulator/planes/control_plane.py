"""The control plane: REST for workspaces, manifests, clusters and queries; gRPC for proxy mode."""

import functools
from collections.abc import Awaitable, Callable
from operator import itemgetter
from urllib.parse import parse_qsl

import msgspec
from pure_protobuf.message import BaseMessage
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from polars_cloud_emulator.model.errors import (
    EmulatorError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    TooLarge,
    Unauthenticated,
    WrongState,
)
from polars_cloud_emulator.model.manifests import Manifest
from polars_cloud_emulator.model.specs import ClusterSpec
from polars_cloud_emulator.model.state import State
from polars_cloud_emulator.model.workspace import (
    CLUSTER_DOMAIN,
    ORGANIZATION_ID,
    WORKSPACE,
    WORKSPACE_ID,
)
from polars_cloud_emulator.planes.query_messages import (
    HOW_TO_SUBMIT,
    parse_id,
    query_result,
    submit,
)
from polars_cloud_emulator.planes.rest_responses import (
    Model,
    cluster_response,
    manifest_response,
    organization_response,
    page_of,
    query_response,
    workspace_response,
)
from polars_cloud_emulator.protocol.access_tokens import (
    ACCOUNT_ID,
    DEVICE_PATH,
    TOKEN_PATH,
    AccessTokens,
)
from polars_cloud_emulator.protocol.client_check import ClientCheck
from polars_cloud_emulator.protocol.device_logins import LIFETIME, POLL_SECONDS, DeviceLogins
from polars_cloud_emulator.protocol.grpc_transport import grpc_route
from polars_cloud_emulator.protocol.journal import LOGIN_PREFIX
from polars_cloud_emulator.protocol.messages import (
    ProxyQueryResultResponse,
    ProxySubmitRequest,
    QueryReference,
)
from polars_cloud_emulator.protocol.request_bodies import MAX_FORM, read_body
from polars_cloud_emulator.protocol.rest_transport import decode_body, json_response, refusal
from polars_cloud_emulator.storage.persisted_plans import PersistedPlans
from polars_cloud_emulator.storage.persisted_state import PersistedState
from polars_cloud_emulator.workers.compute import Compute

SERVICE = "/polars_cloud.control_plane.client.v1.ClientService"
FILE_TYPE_NAMES = {"parquet": "Parquet", "ipc": "IPC", "csv": "Csv", "ndjson": "NDJSON", None: None}

ONE_EACH = "the emulator has exactly one workspace in one organization, which cannot be changed"
NO_CLOUD = "the emulator does not run on AWS, so a workspace cannot be connected to it"
NO_DEFAULTS = "the emulator stores no cluster defaults; set the cluster's cpus and memory instead"
NO_MACHINES = "the emulator's workers share one machine, so there are no nodes to list"
NO_ACCOUNTS = "to add a service account, use the emulator's POST /_emulator/service-accounts"
NO_MONITORING = "the emulator does not store profiles of local queries"
WORKSPACE_PATH = "/api/v1/workspace/{workspace_id:uuid}"
NOT_EMULATED = [
    ("POST", "/api/v1/workspace", ONE_EACH),
    ("POST", "/api/v1/workspace/aws", ONE_EACH),
    ("POST", "/api/v1/workspace/on-prem", ONE_EACH),
    ("DELETE", WORKSPACE_PATH, ONE_EACH),
    ("DELETE", "/api/v1/workspace/on-prem/{workspace_id:uuid}", ONE_EACH),
    ("POST", "/api/v1/organization", ONE_EACH),
    ("DELETE", "/api/v1/organization/{organization_id:uuid}", ONE_EACH),
    ("GET", "/api/v1/workspace/aws/{workspace_id:uuid}/setup-url", NO_CLOUD),
    ("GET", "/api/v1/workspace/aws/{workspace_id:uuid}/stack", NO_CLOUD),
    ("DELETE", f"{WORKSPACE_PATH}/aws", NO_CLOUD),
    ("PUT", f"{WORKSPACE_PATH}/cluster-defaults", NO_DEFAULTS),
    ("GET", f"{WORKSPACE_PATH}/compute/{{cluster_id:uuid}}/node", NO_MACHINES),
    ("GET", f"{WORKSPACE_PATH}/token", NO_ACCOUNTS),
    ("POST", f"{WORKSPACE_PATH}/token", NO_ACCOUNTS),
    ("DELETE", f"{WORKSPACE_PATH}/token/{{account_id:uuid}}", NO_ACCOUNTS),
    ("PUT", f"{WORKSPACE_PATH}/query/{{query_id:uuid}}", NO_MONITORING),
    ("POST", f"{WORKSPACE_PATH}/query/{{query_id:uuid}}/started", NO_MONITORING),
    ("POST", f"{WORKSPACE_PATH}/query/{{query_id:uuid}}/failed", NO_MONITORING),
    ("PATCH", "/api/v1/user", "the emulator stores no user settings; name the workspace instead"),
]
"""Calls of the client that are refused, each with the reason."""

ORDERS = ("request_time", "created_at", "updated_at")


class RegisterManifest(ClusterSpec, kw_only=True):
    name: str


class StartManifest(msgspec.Struct):
    name: str


class ControlPlane:
    """The routes behind ``POLARS_CLOUD_API_ADDR``.

    Parameters
    ----------
    pages_address
        URL of the pages, where a device login is confirmed.
    certificate_authority
        Certificate (PEM) of the authority that issued the compute plane's certificate.
    compute_plane_address
        ``host:port`` of scheduler and observatory.
    """

    def __init__(
        self,
        state: State,
        persisted: PersistedState,
        compute: Compute,
        plans: PersistedPlans,
        access_tokens: AccessTokens,
        device_logins: DeviceLogins,
        check_client: ClientCheck,
        *,
        pages_address: str,
        certificate_authority: str,
        compute_plane_address: str,
    ) -> None:
        self._state = state
        self._persisted = persisted
        self._compute = compute
        self._plans = plans
        self._access_tokens = access_tokens
        self._device_logins = device_logins
        self._pages_address = pages_address
        self._check_client = check_client
        self._certificate_authority = certificate_authority
        self._compute_plane_address = compute_plane_address

    def routes(self) -> list[Route]:
        cluster = WORKSPACE_PATH + "/compute/{cluster_id:uuid}"
        query = WORKSPACE_PATH + "/query/{query_id:uuid}"
        rest = [
            ("GET", "/api/v1/user/me", self.get_user),
            ("GET", "/api/v1/organization", self.list_organizations),
            ("GET", "/api/v1/organization/{organization_id:uuid}", self.get_organization),
            ("GET", "/api/v1/workspace", self.list_workspaces),
            ("GET", WORKSPACE_PATH, self.get_workspace),
            ("GET", WORKSPACE_PATH + "/aws", self.get_aws_connection),
            ("GET", WORKSPACE_PATH + "/cluster-defaults", self.get_cluster_defaults),
            ("POST", WORKSPACE_PATH + "/compute/start", self.start_cluster),
            ("GET", WORKSPACE_PATH + "/compute", self.list_clusters),
            ("GET", cluster, self.get_cluster),
            ("POST", cluster + "/stop", self.stop_cluster),
            ("GET", cluster + "/public_info", self.get_public_info),
            ("POST", WORKSPACE_PATH + "/manifest", self.register_manifest),
            ("DELETE", WORKSPACE_PATH + "/manifest", self.unregister_manifest),
            ("GET", WORKSPACE_PATH + "/manifest/find", self.find_manifest),
            ("POST", WORKSPACE_PATH + "/manifest/start", self.start_manifest),
            ("GET", WORKSPACE_PATH + "/query", self.list_queries),
            ("GET", query, self.get_query),
            ("POST", query + "/cancel", self.cancel_query),
        ]
        return [
            Route(TOKEN_PATH, self.get_token, methods=["POST"]),
            Route(DEVICE_PATH, self.begin_device_login, methods=["POST"]),
            *(Route(path, self._checked(call), methods=[method]) for method, path, call in rest),
            grpc_route(
                f"{SERVICE}/SubmitQuery", self._check_client, ProxySubmitRequest, self.submit_query
            ),
            grpc_route(
                f"{SERVICE}/GetQueryResult",
                self._check_client,
                QueryReference,
                self.get_query_result,
            ),
        ]

    def refusals(self) -> list[Route]:
        """Return the routes of calls that the emulator does not support."""
        return [
            Route(path, self._checked(functools.partial(_refuse, reason)), methods=[method])
            for method, path, reason in NOT_EMULATED
        ]

    def _checked(
        self, call: Callable[[Request], Awaitable[object]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                self._check_client(request.headers)
                if request.path_params.get("workspace_id", WORKSPACE_ID) != WORKSPACE_ID:
                    raise NotFound("workspace does not exist")
                answer = await call(request)
            except EmulatorError as error:
                return refusal(error)
            return Response(status_code=204) if answer is None else json_response(answer)

        return endpoint

    # Login

    async def get_token(self, request: Request) -> Response:
        try:
            form = dict(parse_qsl((await read_body(request, MAX_FORM)).decode()))
        except (TooLarge, ValueError) as error:
            return _oauth_error("invalid_request", error)
        try:
            match form.get("grant_type"):
                case "password":
                    user = form.get("username", "").removesuffix("@sa.cloud.pola.rs")
                    token = self._access_tokens.issue(user, form.get("password", ""))
                    return json_response({"access_token": token, "token_type": "Bearer"})
                case "refresh_token":
                    tokens = self._access_tokens.renew(form.get("refresh_token", ""))
                case "urn:ietf:params:oauth:grant-type:device_code":
                    confirmed = self._device_logins.collect(form.get("device_code", ""))
                    if confirmed is None:
                        return _oauth_error(
                            "authorization_pending", "the code is not confirmed yet"
                        )
                    tokens = confirmed
                case other:
                    return _oauth_error(
                        "unsupported_grant_type", f"the grant type '{other}' is not supported"
                    )
        except Unauthenticated as error:
            return _oauth_error("invalid_grant", error, error.http_status)
        except NotFound as error:
            return _oauth_error("expired_token", error)
        return json_response(
            {
                "access_token": tokens.access,
                "refresh_token": tokens.refresh,
                "token_type": "Bearer",
            }
        )

    async def begin_device_login(self, request: Request) -> Response:
        login = self._device_logins.begin()
        address = f"{self._pages_address}{LOGIN_PREFIX}{login.user_code}"
        return json_response(
            {
                "device_code": login.device_code,
                "user_code": login.user_code,
                "verification_uri": address,
                "verification_uri_complete": address,
                "expires_in": int(LIFETIME.total_seconds()),
                "interval": POLL_SECONDS,
            }
        )

    # Users, organizations, workspaces

    async def get_user(self, request: Request) -> Model:
        return {
            "id": ACCOUNT_ID,
            "avatar_url": None,
            "newsletter_updates": False,
            "personal_emails": False,
            "default_workspace_id": WORKSPACE_ID,
        }

    async def list_organizations(self, request: Request) -> Model:
        return page_of([organization_response()], request)

    async def get_organization(self, request: Request) -> Model:
        if request.path_params["organization_id"] != ORGANIZATION_ID:
            raise NotFound("organization does not exist")
        return organization_response()

    async def list_workspaces(self, request: Request) -> Model:
        name = request.query_params.get("name", "").lower()
        return page_of([workspace_response()] if name in WORKSPACE else [], request)

    async def get_workspace(self, request: Request) -> Model:
        return workspace_response()

    async def get_aws_connection(self, request: Request) -> Model:
        raise NotFound("the emulator's workspace is not connected to an AWS account")

    async def get_cluster_defaults(self, request: Request) -> Model:
        return {"instance_specs": {"specs": {"cpus": 2, "ram_gb": 4}}, "cluster_size": 1}

    # Clusters

    async def start_cluster(self, request: Request) -> Model:
        spec = await decode_body(request, ClusterSpec)
        return cluster_response(
            self._compute.start(lambda: self._state.clusters.start(spec), request.scope["fault"])
        )

    async def list_clusters(self, request: Request) -> Model:
        wanted = request.query_params.get("status")
        clusters = self._state.clusters.by_id.values()
        listed = [c for c in clusters if wanted is None or c.status in wanted.split(",")]
        return page_of([cluster_response(cluster) for cluster in listed], request)

    async def get_cluster(self, request: Request) -> Model:
        return cluster_response(self._state.clusters.find(request.path_params["cluster_id"]))

    async def stop_cluster(self, request: Request) -> None:
        await self._compute.stop(request.path_params["cluster_id"])

    async def get_public_info(self, request: Request) -> Model:
        cluster = self._state.clusters.find(request.path_params["cluster_id"])
        if cluster.spec.mode == "Proxy":
            raise WrongState(f"cluster {cluster.id} is in proxy mode: {HOW_TO_SUBMIT['Proxy']}")
        endpoint = {
            "address": self._compute_plane_address,
            # All clusters share one port and are distinguished by this name alone.
            "tls_server_name": f"{cluster.id}.{CLUSTER_DOMAIN}",
        }
        return {
            "cluster_id": cluster.id,
            "public_address": self._compute_plane_address.rpartition(":")[0],
            "public_server_key": self._certificate_authority,
            "scheduler": endpoint,
            "observatory": endpoint,
        }

    # Manifests

    async def register_manifest(self, request: Request) -> Model:
        body = await decode_body(request, RegisterManifest)
        spec = msgspec.convert(
            {field: getattr(body, field) for field in ClusterSpec.__struct_fields__}, ClusterSpec
        )
        with self._persisted.transaction(self._state):
            manifest = self._state.manifests.register(body.name, spec)
        return self._manifest(manifest)

    async def unregister_manifest(self, request: Request) -> None:
        with self._persisted.transaction(self._state):
            self._state.unregister_manifest(request.query_params.get("name", ""))

    async def find_manifest(self, request: Request) -> Model:
        return self._manifest(self._state.manifests.find(request.query_params.get("name", "")))

    async def start_manifest(self, request: Request) -> Model:
        name = (await decode_body(request, StartManifest)).name
        return cluster_response(
            self._compute.start(lambda: self._state.start_manifest(name), request.scope["fault"])
        )

    def _manifest(self, manifest: Manifest) -> Model:
        live = self._state.clusters.live_of(manifest.name)
        return manifest_response(manifest, live.id if live else None)

    # Queries

    async def list_queries(self, request: Request) -> Model:
        models = [
            query_response(q) | {"active_share_count": 0}
            for q in self._state.queries.by_id.values()
        ]
        field, _, direction = request.query_params.get("order", "request_time,asc").partition(",")
        if field not in ORDERS or direction not in {"asc", "desc"}:
            raise InvalidRequest(
                f"order must be one of {', '.join(ORDERS)}, followed by ',asc' or ',desc'"
            )
        models.sort(key=itemgetter(field), reverse=direction == "desc")
        return page_of(models, request)

    async def get_query(self, request: Request) -> Model:
        query = self._state.queries.find(request.path_params["query_id"])
        result = query_result(query)
        model = query_response(query)
        if query.has_ended:
            file_type = query.outcome.file_type if query.outcome else None
            model["result"] = {
                "total_stages": result.total_stages,
                "finished_stages": result.finished_stages,
                "failed_stages": result.failed_stages,
                "errors": [error.message for error in result.errors],
                "n_rows_result": result.output.n_rows if result.output else None,
                "file_type_sink": FILE_TYPE_NAMES[file_type],
            }
        return model

    async def cancel_query(self, request: Request) -> None:
        self._compute.cancel(request.path_params["query_id"])

    async def submit_query(self, message: ProxySubmitRequest, request: Request) -> BaseMessage:
        query = await submit(
            self._state,
            self._compute,
            self._plans,
            parse_id(message.compute),
            message,
            request,
        )
        return QueryReference.of(query.id)

    async def get_query_result(self, message: QueryReference, request: Request) -> BaseMessage:
        return ProxyQueryResultResponse(
            query_result(self._state.queries.find(parse_id(message.query)))
        )


def _oauth_error(error: str, description: object, status: int = 400) -> Response:
    return json_response({"error": error, "error_description": str(description)}, status)


async def _refuse(reason: str, request: Request) -> None:
    raise PermissionDenied(reason)
