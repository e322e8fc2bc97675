"""`kept_plans.py`: a file for each plan, and none without its query."""

from pathlib import Path
from uuid import uuid4

import pytest

from polars_cloud_emulator.model.errors import CannotKeep
from polars_cloud_emulator.storage.kept_plans import MAX_KEPT_PLAN, KeptPlans


@pytest.fixture
def plans(tmp_path: Path) -> KeptPlans:
    return KeptPlans(tmp_path)


@pytest.mark.parametrize("size", [MAX_KEPT_PLAN, MAX_KEPT_PLAN + 1])
def test_a_large_plan_ends_with_its_query(plans: KeptPlans, size: int) -> None:
    query_id = uuid4()
    plans.keep(query_id, bytes(size))
    plans.delete_large(query_id)
    assert plans.path(query_id).exists() == (size <= MAX_KEPT_PLAN)
    plans.delete_large(query_id)


def test_all_but_the_plans_of_known_queries_is_deleted(plans: KeptPlans, tmp_path: Path) -> None:
    known, unknown = uuid4(), uuid4()
    for query_id in (known, unknown):
        plans.keep(query_id, b"plan")
    (tmp_path / "of a killed worker").touch()
    plans.delete_all_but([known])
    assert [*tmp_path.iterdir()] == [plans.path(known)]


def test_a_plan_that_the_disk_does_not_take_is_refused(tmp_path: Path) -> None:
    # A folder that is missing stands for a disk that is full.
    plans = KeptPlans(tmp_path / "missing")
    with pytest.raises(CannotKeep, match=r"cannot keep its state \(.*: make room for it"):
        plans.keep(uuid4(), b"plan")
