"""Register manifests with the options in the code, for the worker's Polars and Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .client import (
    COMPARED_AS_WRITTEN,
    get_changes,
    get_cluster_id,
    get_spec,
    misspecified_error,
    not_found_error,
    unregister_manifest,
)
from .session import CloudSession

if TYPE_CHECKING:
    from polars_cloud import ComputeContext

logger = logging.getLogger(__name__)

MAX_REGISTRATIONS = 5
"""Maximum attempts while other tasks change the manifest."""

Cluster = Mapping[str, Any]
"""A manifest's `name`, and options of `polars_cloud.ComputeContext`: `cpus`, `memory`, ..."""


def register_manifest(
    session: CloudSession, cluster: Cluster, is_used: Callable[[], bool]
) -> ComputeContext:
    """Register the manifest if it does not exist, or again if its options have changed.

    A manifest pins the patch versions of Polars and Python, and the client refuses a mismatch. A
    live cluster of other versions keeps running without a manifest until its idle timeout. The
    options of a cluster are not changed while the cluster is in use. An option that the code omits
    keeps its registered value.

    Parameters
    ----------
    cluster
        Manifest's name and options.
    is_used
        Function that returns whether another task uses the cluster. Called only if the cluster is
        live and idle.

    Returns
    -------
    polars_cloud.ComputeContext
        Context of the manifest.

    Raises
    ------
    ValueError
        Polars Cloud refused the options.
    """
    name = cluster["name"]
    try:
        registered = find_manifest(session, name)
    except misspecified_error() as error:
        logger.warning("Registering manifest %s again: %s", name, error)
        wanted = _unnamed(session, cluster)
        session.call(unregister_manifest, wanted, name)
        return _register(session, wanted, name)
    if registered is None:
        return _register(session, _unnamed(session, cluster), name)

    try:
        changes = _find_changes(session, registered, cluster)
    except not_found_error():  # another task is changing the manifest
        return _register(session, _unnamed(session, cluster), name)
    if not changes:
        return registered
    status = session.call(registered.get_status)
    is_live = status.is_available() or status.name == "STARTING"
    if is_live and (status.name != "IDLE" or is_used()):
        logger.warning(
            "Manifest %s is not changed while cluster %s is in use; the next start applies: %s",
            name,
            get_cluster_id(registered),
            changes,
        )
        return registered
    wanted = _unnamed(session, cluster)
    logger.info("Changing manifest %s: %s", name, changes)
    if is_live:
        session.call(registered.stop)
    session.call(unregister_manifest, wanted, name)
    return _register(session, wanted, name)


def find_manifest(session: CloudSession, name: str) -> ComputeContext | None:
    """Return the manifest's context, or None if there is no such manifest.

    Raises
    ------
    ComputeClusterMisspecified
        The manifest is registered for other versions of Polars or Python.
    """
    from polars_cloud import ComputeContext

    workspace = session.find_workspace()
    try:
        return session.call(lambda: ComputeContext(workspace=workspace, name=name))
    except not_found_error():
        return None


def _find_changes(session: CloudSession, registered: ComputeContext, cluster: Cluster) -> str:
    options = {key: value for key, value in cluster.items() if key != "name"}
    if not options.keys() <= COMPARED_AS_WRITTEN:
        # The client normalizes the other options, and refuses unknown ones.
        unnamed = _unnamed(session, cluster)
        old, new = (session.call(get_spec, ctx) for ctx in (registered, unnamed))
        # Polars Cloud fills in options that the code omits.
        changes = {key: (old[key], new[key]) for key in new if new[key] and old[key] != new[key]}
    else:
        changes = get_changes(registered, options)
    return ", ".join(f"{key} {old} → {new}" for key, (old, new) in changes.items())


def _register(session: CloudSession, wanted: ComputeContext, name: str) -> ComputeContext:
    refusal = ValueError()
    for _ in range(MAX_REGISTRATIONS):
        try:
            session.call(wanted.register, name)
        except ValueError as error:
            # Another task may have registered it, or an earlier attempt whose reply was lost.
            if found := find_manifest(session, name):
                return found
            # Or another task has just removed it, to change it.
            refusal = error
        else:
            logger.info("Registered manifest %s", name)
            return wanted
    raise refusal


def _unnamed(session: CloudSession, cluster: Cluster) -> ComputeContext:
    from polars_cloud import ComputeContext

    workspace = session.find_workspace()
    options = {key: value for key, value in cluster.items() if key != "name"}
    return session.call(lambda: ComputeContext(workspace=workspace, **options))
