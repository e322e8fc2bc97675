"""`kept_plans.py`: a plan until its query has ended, and what is shown of it from then on."""

from pathlib import Path
from uuid import uuid4

import pytest

from polars_cloud_emulator.model.errors import CannotKeep
from polars_cloud_emulator.storage.kept_plans import KeptPlans


@pytest.fixture
def plans(tmp_path: Path) -> KeptPlans:
    return KeptPlans(tmp_path)


@pytest.mark.parametrize("shown", [b"shown", None])
def test_plan_is_deleted_and_what_is_shown_of_it_is_not(
    plans: KeptPlans, shown: bytes | None
) -> None:
    query_id = uuid4()
    plans.keep(query_id, b"plan", shown=shown)
    assert plans.best_path(query_id) == plans.path(query_id)
    for _ in range(2):
        plans.end(query_id)
        path = plans.best_path(query_id)
        assert (path and path.read_bytes()) == shown
    plans.delete(query_id)
    assert plans.best_path(query_id) is None


def test_all_but_the_plans_of_known_queries_is_deleted(plans: KeptPlans, tmp_path: Path) -> None:
    active, ended, unknown = uuid4(), uuid4(), uuid4()
    for query_id in (active, ended, unknown):
        plans.keep(query_id, b"plan", shown=b"shown")
    (tmp_path / "of a killed worker").touch()
    plans.delete_all_but(active=[active], ended=[ended])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {str(active), f"{active}.shown", f"{ended}.shown"}


def test_a_plan_that_the_disk_does_not_take_is_refused(tmp_path: Path) -> None:
    # A folder that is missing stands for a disk that is full.
    plans = KeptPlans(tmp_path / "missing")
    with pytest.raises(CannotKeep, match=r"cannot keep its state \(.*: make room for it"):
        plans.keep(uuid4(), b"plan", shown=None)
