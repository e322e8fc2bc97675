"""The rules of the state, at moments that the test chooses."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.errors import Conflict, InvalidRequest, NotFound, WrongState
from polars_cloud_emulator.model.state import (
    MAX_ENDED_QUERIES,
    MAX_STOPPED_CLUSTERS,
    Cluster,
    ClusterSpec,
    ClusterStatus,
    Outcome,
    Query,
    QueryStatus,
    Specs,
    State,
    TerminationReason,
    Version,
)
from polars_cloud_emulator.protocol.journal import MAX_ENTRIES, Journal
from polars_cloud_emulator.storage.kept_state import KeptState

OUTCOME = Outcome(destinations=["s3://x"], file_type="parquet", n_rows=1, head=None)
MINUTE = timedelta(minutes=1)


class StoppedClock(Clock):
    """Time that passes only when it is advanced."""

    def __init__(self) -> None:
        super().__init__()
        self._start = super().now()

    def now(self) -> Any:
        return self._start + self._ahead


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock()


@pytest.fixture
def state(clock: StoppedClock) -> State:
    return State(clock, python_version="3.11.7", polars_version="2.0.0")


def spec(**changed: Any) -> ClusterSpec:
    values: dict[str, Any] = {
        "cluster_size": 2,
        "mode": "Direct",
        "python_version": Version(3, 11, 7),
        "polars_version": "2.0.0",
        "specs": Specs(2, 4),
    }
    return ClusterSpec(**values | changed)


def submit(state: State, cluster_id: UUID, **changed: Any) -> Query:
    values: dict[str, Any] = {
        "query_id": uuid4(),
        "output_location": None,
        "distributed": False,
        "engine": "streaming",
        "optimization_flags": None,
        "priority": 0,
        "labels": [],
        "user": None,
    }
    return state.submit(cluster_id, **values | changed)


@pytest.fixture
def cluster(state: State) -> Cluster:
    return state.start_cluster(spec())


def test_cluster_runs_until_its_last_query_ends(
    state: State, clock: StoppedClock, cluster: Cluster
) -> None:
    first, second = submit(state, cluster.id), submit(state, cluster.id)
    assert cluster.status is ClusterStatus.IDLE
    assert state.start_next(cluster.id, 2) is first
    assert state.start_next(cluster.id, 1) is second
    assert cluster.status is ClusterStatus.RUNNING
    state.succeed(first, OUTCOME)
    assert cluster.status is ClusterStatus.RUNNING
    clock.advance(MINUTE)
    state.fail(second, "ValueError: no")
    assert cluster.status is ClusterStatus.IDLE
    assert cluster.idle_since == clock.now() == second.ended_at
    assert (state.query_seconds(first), state.query_seconds(second)) == (0, 60)


def test_ended_query_keeps_its_end(state: State, cluster: Cluster) -> None:
    query = submit(state, cluster.id)
    state.start_next(cluster.id, 1)
    state.cancel(query.id)
    state.succeed(query, OUTCOME)
    state.fail(query, "ValueError: no")
    assert query.status is QueryStatus.CANCELED
    assert (query.outcome, query.error) == (None, None)


@pytest.mark.parametrize(
    ("free", "waiting", "next_up"),
    [
        (0, [("a", False, 0)], None),
        (1, [], None),
        (1, [("a", False, 0), ("b", False, 0)], "a"),
        (1, [("a", False, 0), ("b", False, 1)], "b"),
        (1, [("a", False, -1), ("b", False, 0)], "b"),
        (1, [("a", True, 0), ("b", False, 0)], None),
        (1, [("a", True, 0), ("b", False, 1)], "b"),
        (2, [("a", True, 0), ("b", False, 0)], "a"),
    ],
)
def test_next_query_is_the_first_of_the_highest_priority_if_it_fits(
    state: State,
    cluster: Cluster,
    free: int,
    waiting: list[tuple[str, bool, int]],
    next_up: str | None,
) -> None:
    for name, distributed, priority in waiting:
        submit(state, cluster.id, labels=[name], distributed=distributed, priority=priority)
    query = state.start_next(cluster.id, free)
    assert (query and query.labels) == (next_up and [next_up])


def test_cluster_is_idle_too_long_exactly_at_its_timeout(state: State, clock: StoppedClock) -> None:
    short = state.start_cluster(spec(idle_timeout_mins=10))
    default = state.start_cluster(spec())
    clock.advance(10 * MINUTE - timedelta.resolution)
    assert state.idle_too_long() == []
    clock.advance(timedelta.resolution)
    assert state.idle_too_long() == [short.id]
    query = submit(state, short.id)
    state.start_next(short.id, 1)
    clock.advance(49 * MINUTE)
    assert state.idle_too_long() == []
    state.succeed(query, OUTCOME)
    clock.advance(MINUTE)
    assert state.idle_too_long() == [default.id]


def test_starting_cluster_is_ready_after_the_delay_and_idle_from_then_on(
    clock: StoppedClock,
) -> None:
    state = State(clock, python_version="3.11.7", polars_version="2.0.0")
    cluster = state.start_cluster(spec(idle_timeout_mins=10))
    state.postpone(cluster, 2 * MINUTE)
    query = submit(state, cluster.id)
    assert state.start_next(cluster.id, 2) is None
    clock.advance(2 * MINUTE - timedelta.resolution)
    assert (state.become_ready(), cluster.status) == ([], ClusterStatus.STARTING)
    clock.advance(timedelta.resolution)
    assert (state.become_ready(), cluster.status) == ([cluster.id], ClusterStatus.IDLE)
    assert state.become_ready() == []
    clock.advance(9 * MINUTE)
    assert state.idle_too_long() == []
    assert state.start_next(cluster.id, 2) is query


def test_stop_fails_what_has_not_ended_and_ends_the_bill(
    state: State, clock: StoppedClock, cluster: Cluster
) -> None:
    ended, running, queued = (submit(state, cluster.id) for _ in range(3))
    state.start_next(cluster.id, 2)
    state.succeed(ended, OUTCOME)
    state.start_next(cluster.id, 2)
    clock.advance(MINUTE)
    assert state.begin_stop(cluster, TerminationReason.STOPPED_BY_USER)
    assert cluster.status is ClusterStatus.STOPPING
    assert not state.begin_stop(cluster, TerminationReason.STOPPED_INACTIVE)
    state.end_stop(cluster)
    assert not state.begin_stop(cluster, TerminationReason.STOPPED_INACTIVE)
    clock.advance(MINUTE)
    assert cluster.status is ClusterStatus.STOPPED
    assert cluster.termination_reason is TerminationReason.STOPPED_BY_USER
    assert state.billed_seconds(cluster) == 60
    assert ended.status is QueryStatus.SUCCESS
    assert running.error == queued.error == "RuntimeError: cluster was stopped"
    with pytest.raises(WrongState, match="it takes no query"):
        submit(state, cluster.id)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"cluster_size": 0}, "cluster_size"),
        ({"specs": None}, "cpus and memory"),
        ({"idle_timeout_mins": 9}, "at least 10"),
        ({"idle_timeout_mins": 0}, "at least 10"),
        ({"python_version": Version(3, 11, 8)}, "workers run Python 3.11.7, not 3.11.8"),
        ({"polars_version": "2.0.1"}, "workers run Polars 2.0.0, not 2.0.1"),
    ],
)
def test_cluster_that_cannot_be_is_refused(
    state: State, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        state.start_cluster(spec(**changed))
    assert state.clusters == {}


def test_manifest_has_one_live_cluster_and_a_name_of_its_own(state: State) -> None:
    with pytest.raises(NotFound):
        state.start_manifest("nightly")
    state.register_manifest("nightly", spec())
    with pytest.raises(Conflict):
        state.register_manifest("nightly", spec())
    first = state.start_manifest("nightly")
    assert state.start_manifest("nightly") is first
    state.begin_stop(first, TerminationReason.STOPPED_BY_USER)
    second = state.start_manifest("nightly")
    assert second is not first
    state.unregister_manifest("nightly")
    assert second.is_live
    state.register_manifest("nightly", spec())
    assert state.live_cluster_of("nightly") is None


@pytest.mark.parametrize("find", ["find_cluster", "find_query"])
def test_unknown_id_is_not_found(state: State, find: str) -> None:
    unknown: Callable[[UUID], object] = getattr(state, find)
    with pytest.raises(NotFound, match="does not exist"):
        unknown(uuid4())


def test_restart_runs_again_what_was_running(
    state: State, clock: StoppedClock, cluster: Cluster, tmp_path: Path
) -> None:
    ended, running, _queued = (submit(state, cluster.id) for _ in range(3))
    state.start_next(cluster.id, 2)
    state.succeed(ended, OUTCOME)
    state.start_next(cluster.id, 2)
    kept = KeptState(tmp_path / "state.sqlite")
    kept.commit(state)

    after = State(clock, python_version="3.11.7", polars_version="2.0.0")
    after.restore(KeptState(tmp_path / "state.sqlite").load())
    statuses = [query.status for query in after.queries.values()]
    assert statuses == [QueryStatus.SUCCESS, QueryStatus.SCHEDULED, QueryStatus.SCHEDULED]
    again = after.start_next(cluster.id, 2)
    assert again is not None
    assert again.id == running.id
    assert after.find_query(ended.id).outcome == OUTCOME


def test_only_what_can_have_changed_is_compared_when_the_state_is_kept(
    state: State, cluster: Cluster, tmp_path: Path
) -> None:
    ended, unfinished = submit(state, cluster.id), submit(state, cluster.id)
    kept = KeptState(tmp_path / "state.sqlite")
    kept.commit(state)
    state.cancel(ended.id)
    kept.commit(state)
    assert [*state.unsettled] == [unfinished.id]

    state.cancel(ended.id)
    assert {*state.unsettled} == {unfinished.id, ended.id}, "it was canceled once more"
    kept.commit(state)
    state.cancel(unfinished.id)
    kept.commit(state)
    assert not state.unsettled
    assert KeptState(tmp_path / "state.sqlite").load().queries == state.queries


def test_query_that_is_forgotten_is_kept_no_longer(
    state: State, cluster: Cluster, tmp_path: Path
) -> None:
    kept = KeptState(tmp_path / "state.sqlite")
    for _ in range(MAX_ENDED_QUERIES + 1):
        state.cancel(submit(state, cluster.id).id)
    kept.commit(state)
    state.forget_oldest()
    kept.commit(state)
    assert KeptState(tmp_path / "state.sqlite").load().queries == state.queries


def test_oldest_ended_queries_and_stopped_clusters_are_forgotten(
    state: State, clock: StoppedClock
) -> None:
    live = state.start_cluster(spec())
    unfinished = submit(state, live.id)
    for _ in range(MAX_STOPPED_CLUSTERS + 3):
        cluster = state.start_cluster(spec())
        state.begin_stop(cluster, TerminationReason.STOPPED_BY_USER)
        state.end_stop(cluster)
    ended = [submit(state, live.id) for _ in range(MAX_ENDED_QUERIES + 2)]
    for query in ended:
        state.cancel(query.id)

    assert state.forget_oldest() == [ended[0].id, ended[1].id]
    assert state.forget_oldest() == []

    clock.advance(timedelta(seconds=1))
    state.cancel(unfinished.id)
    unfinished = submit(state, live.id)
    assert state.forget_oldest() == [ended[2].id], "the first to be submitted was the last to end"
    assert len(state.queries) == MAX_ENDED_QUERIES + 1
    assert unfinished.id in state.queries
    assert len(state.clusters) == MAX_STOPPED_CLUSTERS + 1
    assert live.id in state.clusters
    assert cluster.id in state.clusters


def test_cluster_of_a_remembered_query_is_remembered(state: State) -> None:
    first = state.start_cluster(spec())
    query = submit(state, first.id)
    for cluster in [first, *(state.start_cluster(spec()) for _ in range(MAX_STOPPED_CLUSTERS + 1))]:
        state.begin_stop(cluster, TerminationReason.STOPPED_BY_USER)
        state.end_stop(cluster)
    state.forget_oldest()
    assert state.find_query(query.id).cluster_id in state.clusters


def test_journal_keeps_the_latest_calls(clock: StoppedClock) -> None:
    journal = Journal(clock)
    for number in range(MAX_ENTRIES + 5):
        scope = {"type": "http", "method": "GET", "path": f"/{number}", "headers": []}
        journal.record(scope).status = 501 if number < 10 else 200
    assert len(journal.entries) == MAX_ENTRIES
    assert journal.entries[0].path == "/5"
    assert [entry.path for entry in journal.unmatched] == [f"/{n}" for n in range(5, 10)]
