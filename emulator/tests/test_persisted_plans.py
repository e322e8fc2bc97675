"""`persisted_plans.py`: the plan until its query has ended, and the redacted plan after that."""

from pathlib import Path
from uuid import uuid4

import pytest

from polars_cloud_emulator.model.errors import CannotPersist
from polars_cloud_emulator.storage.persisted_plans import PersistedPlans


@pytest.fixture
def plans(tmp_path: Path) -> PersistedPlans:
    return PersistedPlans(tmp_path)


@pytest.mark.parametrize("redacted", [b"redacted", None])
def test_plan_is_deleted_but_not_its_redacted_copy(
    plans: PersistedPlans, redacted: bytes | None
) -> None:
    query_id = uuid4()
    plans.store(query_id, b"plan", redacted=redacted)
    assert plans.best_path(query_id) == plans.path(query_id)
    for _ in range(2):
        plans.discard(query_id)
        path = plans.best_path(query_id)
        assert (path and path.read_bytes()) == redacted
    plans.delete(query_id)
    assert plans.best_path(query_id) is None


def test_all_files_but_plans_of_known_queries_are_deleted(
    plans: PersistedPlans, tmp_path: Path
) -> None:
    active, ended, unknown = uuid4(), uuid4(), uuid4()
    for query_id in (active, ended, unknown):
        plans.store(query_id, b"plan", redacted=b"redacted")
    (tmp_path / "of a killed worker").touch()
    plans.delete_all_but(active=[active], ended=[ended])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {str(active), f"{active}.shown", f"{ended}.shown"}


def test_plan_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    # A missing folder stands for a full disk.
    plans = PersistedPlans(tmp_path / "missing")
    with pytest.raises(CannotPersist, match=r"cannot write its state \(.*: free disk space"):
        plans.store(uuid4(), b"plan", redacted=None)
