"""Find a cluster again by its id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from include.settings import WORKSPACE

if TYPE_CHECKING:
    from polars_cloud import ComputeContext


def find_live_cluster(cluster_id: str) -> ComputeContext | None:
    """Return the cluster's context, or None if it has stopped or was never there."""
    from polars_cloud import ComputeContext
    from polars_cloud.polars_cloud import NotFoundError

    try:
        return ComputeContext.connect(cluster_id, workspace=WORKSPACE)
    except NotFoundError:
        return None
    except RuntimeError as error:
        if "incorrect state" not in str(error):
            raise
        return None
