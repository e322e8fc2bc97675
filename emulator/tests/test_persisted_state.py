"""Persisted state, and its restoration after a restart."""

from pathlib import Path

from emulator.tests.states import OUTCOME, StoppedClock, new_state, submit
from polars_cloud_emulator.model.clusters import Cluster, ClusterStatus, TerminationReason
from polars_cloud_emulator.model.queries import MAX_ENDED_QUERIES, QueryStatus
from polars_cloud_emulator.model.state import State
from polars_cloud_emulator.storage.persisted_plans import PersistedPlans
from polars_cloud_emulator.storage.persisted_state import PersistedState


def persisted_state(folder: Path) -> PersistedState:
    return PersistedState(folder / "state.sqlite", PersistedPlans(folder))


def test_restart_runs_again_what_was_running(
    state: State, clock: StoppedClock, cluster: Cluster, tmp_path: Path
) -> None:
    ended, running, _queued = (submit(state, cluster.id) for _ in range(3))
    state.start_next(cluster.id, 2)
    state.succeed(ended, OUTCOME)
    state.start_next(cluster.id, 2)
    kept = persisted_state(tmp_path)
    kept.commit(state)

    after = new_state(clock)
    after.restore(persisted_state(tmp_path).load())
    statuses = [query.status for query in after.queries.by_id.values()]
    assert statuses == [QueryStatus.SUCCESS, QueryStatus.SCHEDULED, QueryStatus.SCHEDULED]
    again = after.start_next(cluster.id, 2)
    assert again is not None
    assert again.id == running.id
    assert after.queries.find(ended.id).outcome == OUTCOME


def test_cluster_that_was_stopping_has_stopped_after_a_restart(
    state: State, clock: StoppedClock, cluster: Cluster, tmp_path: Path
) -> None:
    state.begin_stop(cluster, TerminationReason.STOPPED_BY_USER)
    kept = persisted_state(tmp_path)
    kept.commit(state)

    after = new_state(clock)
    after.restore(persisted_state(tmp_path).load())
    [stopped] = after.clusters.by_id.values()
    assert (stopped.status, stopped.stopped_at) == (ClusterStatus.STOPPED, clock.now())


def test_only_what_can_have_changed_is_compared_when_the_state_is_kept(
    state: State, cluster: Cluster, tmp_path: Path
) -> None:
    ended, unfinished = submit(state, cluster.id), submit(state, cluster.id)
    kept = persisted_state(tmp_path)
    kept.commit(state)
    state.cancel(ended.id)
    kept.commit(state)
    assert [*state.queries.uncommitted] == [unfinished.id]

    state.cancel(ended.id)
    assert {*state.queries.uncommitted} == {unfinished.id, ended.id}, "it was canceled once more"
    kept.commit(state)
    state.cancel(unfinished.id)
    kept.commit(state)
    assert not state.queries.uncommitted
    assert persisted_state(tmp_path).load().queries == state.queries.by_id


def test_dropped_query_is_deleted_on_disk(state: State, cluster: Cluster, tmp_path: Path) -> None:
    kept = persisted_state(tmp_path)
    for _ in range(MAX_ENDED_QUERIES + 1):
        state.cancel(submit(state, cluster.id).id)
    kept.commit(state)
    state.forget_oldest()
    kept.commit(state)
    assert persisted_state(tmp_path).load().queries == state.queries.by_id
