"""JSON models of workspaces, manifests, clusters and queries in the control plane's responses."""

from datetime import datetime
from typing import Any
from uuid import UUID

from starlette.requests import Request

from polars_cloud_emulator.model.clusters import Cluster
from polars_cloud_emulator.model.instance_types import instance_types
from polars_cloud_emulator.model.manifests import Manifest
from polars_cloud_emulator.model.queries import Query
from polars_cloud_emulator.model.specs import ClusterSpec
from polars_cloud_emulator.model.workspace import ORGANIZATION_ID, WORKSPACE, WORKSPACE_ID
from polars_cloud_emulator.planes.query_messages import ENGINE_NAMES, QUERY_TYPE_NAMES
from polars_cloud_emulator.protocol.access_tokens import ACCOUNT_ID
from polars_cloud_emulator.protocol.rest_transport import positive_parameter

EPOCH = "2026-01-01T00:00:00Z"

Model = dict[str, Any]


def page_of(models: list[Model], request: Request) -> Model:
    """Return the page of a list that the request's ``page`` and ``limit`` select."""
    page = positive_parameter(request, "page", 1)
    limit = positive_parameter(request, "limit", 1000)
    result = models[(page - 1) * limit : page * limit]
    return {
        "pagination": {
            "page": page,
            "limit": limit,
            "amount": len(result),
            "total_pages": -(-len(models) // limit),
            "total_count": len(models),
        },
        "result": result,
    }


def organization_response() -> Model:
    return {
        "id": ORGANIZATION_ID,
        "name": "emulator",
        "description": "",
        "creator_id": ACCOUNT_ID,
        "avatar_url": None,
        "subscription_state": "Subscribed",
        "tier": "PayAsYouGo",
        "created_at": EPOCH,
        "updated_at": EPOCH,
    }


def workspace_response() -> Model:
    return {
        "id": WORKSPACE_ID,
        "organization_id": ORGANIZATION_ID,
        "name": WORKSPACE,
        "description": "",
        "creator_id": ACCOUNT_ID,
        "status": "Active",
        "deployment": "OnPrem",
        "idle_timeout_mins": 60,
        "created_at": EPOCH,
        "updated_at": EPOCH,
    }


def _hardware(spec: ClusterSpec) -> Model:
    model: Model = {
        "cluster_size": spec.cluster_size,
        "vcpus": spec.vcpus,
        "mode": spec.mode,
        "log_level": spec.log_level or "Info",
        "req_storage": spec.storage,
        "req_big_instance_storage": spec.big_instance_storage,
    }
    if spec.specs is not None:
        model |= {
            "req_cpu_cores": spec.specs.cpus,
            "req_ram_gb": spec.specs.ram_gb,
            "req_big_instance_multiplier": spec.specs.multiplier,
            "cpu_architectures": spec.specs.cpu_architectures,
            "ram_mib": spec.specs.ram_gb * 1024,
        }
    if spec.instance_type is not None:
        model |= {
            "instance_type": spec.instance_type.standard,
            "big_instance_type": spec.instance_type.big,
            "ram_mib": instance_types()[spec.instance_type.standard].ram_mib,
        }
    return model


def manifest_response(manifest: Manifest, live_cluster_id: UUID | None) -> Model:
    spec = manifest.spec
    return {
        "id": manifest.id,
        "workspace_id": WORKSPACE_ID,
        "name": manifest.name,
        "polars_version": spec.polars_version,
        "python_version": str(spec.python_version),
        "idle_timeout_mins": spec.idle_timeout_mins,
        "requirements_txt": spec.requirements_txt,
        "env_vars": spec.env_vars,
        "live_cluster_id": live_cluster_id,
        **_hardware(spec),
    }


def cluster_response(cluster: Cluster) -> Model:
    model = {
        "id": cluster.id,
        "user_id": ACCOUNT_ID,
        "workspace_id": WORKSPACE_ID,
        "name": cluster.manifest,
        "request_time": cluster.requested_at,
        "deployment_type": "OnPrem",
        "connection_status": "Connected",
        "status": cluster.status,
        "polars_version": cluster.spec.polars_version,
        "gc_inactive_hours": 1,
        **_hardware(cluster.spec),
    }
    if cluster.termination_reason is not None:
        model["termination"] = {
            "termination_reason": cluster.termination_reason,
            "termination_time": cluster.stopped_at or cluster.requested_at,
            "termination_message": cluster.termination_message,
        }
    return model


def query_response(query: Query) -> Model:
    changed: datetime = query.ended_at or query.started_at or query.submitted_at
    return {
        "id": query.id,
        "workspace_id": WORKSPACE_ID,
        "cluster_id": query.cluster_id,
        "user_id": ACCOUNT_ID,
        "request_time": query.submitted_at,
        "output_location": query.output_location,
        "started_at": query.started_at,
        "ended_at": query.ended_at,
        "status_code": query.status,
        "latest_status": query.status,
        "status_updated_at": changed,
        "latest_status_time": changed,
        "created_at": query.submitted_at,
        "updated_at": changed,
        "query_type": QUERY_TYPE_NAMES[query.distributed],
        "engine": ENGINE_NAMES[query.engine],
        "execute_until": "OptimizeIr" if query.only_planned else "Execute",
    }
