"""`include/live_clusters.py`: a cluster is found by its id as long as it is live."""

from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest

from include.live_clusters import find_live_cluster
from polars_cloud_emulator.testing import RunningEmulator


@pytest.fixture
def ctx(pc: ModuleType) -> Any:
    ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    ctx.start()
    return ctx


def test_a_live_cluster_is_found(ctx: Any) -> None:
    found = find_live_cluster(str(ctx._compute_id))
    assert found is not None
    assert found._compute_id == ctx._compute_id
    assert found.get_status().is_available()


def test_a_stopped_cluster_is_not_found(ctx: Any) -> None:
    ctx.stop()
    assert find_live_cluster(str(ctx._compute_id)) is None


@pytest.mark.usefixtures("pc")
def test_an_unknown_cluster_is_not_found() -> None:
    assert find_live_cluster(str(uuid4())) is None


def test_not_to_reach_polars_cloud_is_an_error(ctx: Any, emulator: RunningEmulator) -> None:
    emulator.add_fault("GET compute/{id}", "answer_lost")
    with pytest.raises(RuntimeError, match="error sending request"):
        find_live_cluster(str(ctx._compute_id))
