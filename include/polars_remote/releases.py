"""End the use of a cluster: the last of its users stops it."""

from __future__ import annotations

import logging
import time

from . import ledger
from .client_internals import get_cluster_id, misspecified_error
from .ledger import Owner
from .login import call_polars_cloud
from .manifests import find_manifest
from .outages import time_left

logger = logging.getLogger(__name__)

WIND_UP_SECONDS = 10.0
"""For a cluster to become idle after its last query has ended."""


def release_entry(key: str) -> None:
    """End the use of a cluster that the ledger's entry is about, if it is still there."""
    if entry := ledger.get(key):
        owner, value = entry
        release(value["manifest"], owner)


def release(manifest: str, owner: Owner) -> None:
    """End an owner's use of the manifest's cluster; stop it if that was the last.

    Of two who release it at the same time, each looks again when it is off the record: one of them
    is the last.
    """
    key = ledger.cluster_key(manifest, owner)
    if was_last := not ledger.has_other_users(manifest, owner):
        _stop(manifest)
    ledger.erase(key)
    if not was_last:
        if ledger.has_other_users(manifest, owner):
            logger.info("Cluster of manifest %s is left running for its other users", manifest)
        else:
            _stop(manifest)


def _stop(manifest: str) -> None:
    """Stop the cluster unless somebody's query runs on it."""
    try:
        ctx = find_manifest(manifest)
    except misspecified_error() as error:
        logger.info("Manifest %s was registered anew, nothing to stop: %s", manifest, error)
        return
    if ctx is None:
        logger.info("Manifest %s does not exist: nothing to stop", manifest)
        return
    deadline = time.monotonic() + time_left(WIND_UP_SECONDS)
    while (status := call_polars_cloud(ctx.get_status)).name == "RUNNING":
        if time.monotonic() > deadline:
            logger.info(
                "Cluster %s is left running: somebody else's query runs on it",
                get_cluster_id(ctx),
            )
            return
        time.sleep(0.2)
    if status.is_available():
        call_polars_cloud(ctx.stop)
        logger.info("Cluster %s stopped", get_cluster_id(ctx))
    else:
        logger.info("Cluster of manifest %s is not running: nothing to stop", manifest)
