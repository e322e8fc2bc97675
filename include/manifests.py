"""Keep a named manifest registered from code, and fit for the versions of this worker."""

import logging
from typing import Any, Literal

from include.outages import call
from include.settings import WORKSPACE

logger = logging.getLogger(__name__)


def ensure_manifest(name: str, **spec: Any) -> None:
    """Register the manifest if it is absent, and anew if it is for another Polars or Python.

    A manifest pins both versions to the patch, and the client refuses one that does not match.
    A live cluster of a replaced manifest runs on, without a name, until its idle timeout: another
    worker may still be using it.

    Parameters
    ----------
    name
        Name of the manifest.
    spec
        What `polars_cloud.ComputeContext` takes: `cpus`, `memory`, `cluster_size`, ...

    Raises
    ------
    ValueError
        Polars Cloud refused the spec.
    """
    import polars_cloud as pc

    if _look_up(name) == "fitting":
        return
    ctx = call(lambda: pc.ComputeContext(workspace=WORKSPACE, **spec))
    try:
        call(ctx.register, name)
    except ValueError:
        match _look_up(name):
            case "absent":  # so it is the spec that was refused
                raise
            case "fitting":  # another task was faster
                return
            case "outdated":
                call(ctx.unregister)
                call(ctx.register, name)
    logger.info("Registered manifest %s", name)


def _look_up(name: str) -> Literal["absent", "outdated", "fitting"]:
    import polars_cloud as pc
    from polars_cloud.polars_cloud import ComputeClusterMisspecified, NotFoundError

    try:
        call(lambda: pc.ComputeContext(name=name, workspace=WORKSPACE))
    except NotFoundError:
        return "absent"
    except ComputeClusterMisspecified as drift:
        logger.warning("Manifest %s is out of date: %s", name, drift)
        return "outdated"
    return "fitting"
