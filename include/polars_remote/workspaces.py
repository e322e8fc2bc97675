"""Find the workspace in which everything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .airflow_versions import AirflowFailException
from .settings import WORKSPACE

if TYPE_CHECKING:
    from polars_cloud import Workspace


def find_workspace() -> Workspace:
    """Return the workspace that `POLARS_CLOUD_WORKSPACE` names; calls Polars Cloud.

    Raises
    ------
    AirflowFailException
        The account has no such workspace; with those that it has.
    """
    from polars_cloud import Workspace
    from polars_cloud.exceptions import WorkspaceResolveError

    try:
        return Workspace(WORKSPACE)
    except WorkspaceResolveError as error:
        problem = str(error).splitlines()[0].rstrip(".")
    names = ", ".join(sorted(workspace.name for workspace in Workspace.list()))
    raise AirflowFailException(
        f"{problem}. Set POLARS_CLOUD_WORKSPACE to a workspace of this account: "
        f"{names or 'it has none yet, so make one in Polars Cloud first'}"
    )
