"""Keep a manifest registered from code: its size as written there, its versions this worker's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import ledger
from .client_internals import (
    get_cluster_id,
    get_spec,
    misspecified_error,
    not_found_error,
    unregister_manifest,
)
from .ledger import Owner
from .login import call_polars_cloud
from .workspaces import find_workspace

if TYPE_CHECKING:
    from polars_cloud import ComputeContext

logger = logging.getLogger(__name__)

REGISTRATIONS = 5
"""How often a refusal is taken for a moment in which other tasks are changing the manifest."""

Cluster = Mapping[str, Any]
"""What a cluster is to be: a manifest's `name`, and `cpus`, `memory`, `cluster_size`, ..."""


def ensure_manifest(cluster: Cluster, owner: Owner | None = None) -> ComputeContext:
    """Register the manifest if it is absent, and anew if it was registered as something else.

    A manifest pins Polars and Python to the patch, and the client refuses one that does not match.
    A cluster that is in use keeps its size until its users have left; a live cluster of other
    versions runs on, without a name, until its idle timeout. An option that the code leaves out
    stays as it was registered.

    Parameters
    ----------
    cluster
        Manifest's `name`, and what `polars_cloud.ComputeContext` takes: `cpus`, `memory`, ...
    owner
        Who does so, the current task unless given.

    Returns
    -------
    polars_cloud.ComputeContext
        By the manifest's name.

    Raises
    ------
    ValueError
        Polars Cloud refused the specification.
    """
    name = cluster["name"]
    wanted = call_polars_cloud(lambda: _unnamed(cluster))
    try:
        registered = find_manifest(name)
    except misspecified_error() as error:
        logger.warning("Manifest %s is registered anew: %s", name, error)
        call_polars_cloud(unregister_manifest, wanted, name)
        return _register(wanted, name)
    if registered is None:
        return _register(wanted, name)

    try:
        old, new = (call_polars_cloud(get_spec, ctx) for ctx in (registered, wanted))
    except not_found_error():  # another task is just changing it
        return _register(wanted, name)
    changes = ", ".join(
        f"{key} {old[key]} → {value}"
        for key, value in new.items()
        # What the code leaves open is for Polars Cloud to fill in.
        if value and old[key] != value
    )
    if not changes:
        return registered
    status = call_polars_cloud(registered.get_status)
    is_live = status.is_available() or status.name == "STARTING"
    if is_live and (
        status.name != "IDLE" or ledger.has_other_users(name, owner or Owner.current())
    ):
        logger.warning(
            "Manifest %s keeps its size while cluster %s is in use; it is changed at the next "
            "start: %s",
            name,
            get_cluster_id(registered),
            changes,
        )
        return registered
    logger.info("Manifest %s is changed: %s", name, changes)
    if is_live:
        call_polars_cloud(registered.stop)
    call_polars_cloud(unregister_manifest, wanted, name)
    return _register(wanted, name)


def find_manifest(name: str) -> ComputeContext | None:
    """The manifest's context, or None if there is no such manifest.

    Raises
    ------
    ComputeClusterMisspecified
        It was registered for another Polars or Python.
    """
    from polars_cloud import ComputeContext

    try:
        return call_polars_cloud(lambda: ComputeContext(workspace=find_workspace(), name=name))
    except not_found_error():
        return None


def _register(wanted: ComputeContext, name: str) -> ComputeContext:
    refusal = ValueError()
    for _ in range(REGISTRATIONS):
        try:
            call_polars_cloud(wanted.register, name)
        except ValueError as error:
            # It may be there: registered by another task, or by this one when the reply was lost.
            if found := find_manifest(name):
                return found
            # Or it was there, and another task that changes it as well has just removed it.
            refusal = error
        else:
            logger.info("Registered manifest %s", name)
            return wanted
    raise refusal


def _unnamed(cluster: Cluster) -> ComputeContext:
    from polars_cloud import ComputeContext

    spec = {key: value for key, value in cluster.items() if key != "name"}
    return ComputeContext(workspace=find_workspace(), **spec)
