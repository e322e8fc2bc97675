"""The rules between manifests, clusters and queries, with a clock that the test sets."""

from datetime import timedelta
from uuid import uuid4

import pytest

from emulator.tests.states import MINUTE, OUTCOME, StoppedClock, spec, submit
from polars_cloud_emulator.model.clusters import (
    MAX_STOPPED_CLUSTERS,
    Cluster,
    ClusterStatus,
    TerminationReason,
)
from polars_cloud_emulator.model.errors import Conflict, NotFound, WrongState
from polars_cloud_emulator.model.queries import MAX_ENDED_QUERIES, QueryStatus
from polars_cloud_emulator.model.state import State


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
    assert (state.queries.seconds(first), state.queries.seconds(second)) == (0, 60)


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
        (0, [("a", 1, 0)], None),
        (1, [], None),
        (1, [("a", 1, 0), ("b", 1, 0)], "a"),
        (1, [("a", 1, 0), ("b", 1, 1)], "b"),
        (1, [("a", 1, -1), ("b", 1, 0)], "b"),
        (1, [("a", 2, 0), ("b", 1, 0)], None),
        (1, [("a", 2, 0), ("b", 1, 1)], "b"),
        (2, [("a", 2, 0), ("b", 1, 0)], "a"),
    ],
)
def test_next_query_is_the_first_of_the_highest_priority_if_it_fits(
    state: State,
    cluster: Cluster,
    free: int,
    waiting: list[tuple[str, int, int]],
    next_up: str | None,
) -> None:
    for name, workers, priority in waiting:
        options = {"distributed": True, "min_workers": workers, "priority": priority}
        submit(state, cluster.id, labels=[name], **options)
    query = state.start_next(cluster.id, free)
    assert (query and query.labels) == (next_up and [next_up])


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
    state.clusters.end_stop(cluster)
    assert not state.begin_stop(cluster, TerminationReason.STOPPED_INACTIVE)
    clock.advance(MINUTE)
    assert cluster.status is ClusterStatus.STOPPED
    assert cluster.termination_reason is TerminationReason.STOPPED_BY_USER
    assert state.clusters.billed_seconds(cluster) == 60
    assert ended.status is QueryStatus.SUCCESS
    assert running.error == queued.error == "RuntimeError: cluster was stopped"
    with pytest.raises(WrongState, match="it accepts no queries"):
        submit(state, cluster.id)


def test_manifest_has_one_live_cluster_and_a_name_of_its_own(state: State) -> None:
    with pytest.raises(NotFound):
        state.start_manifest("nightly")
    state.manifests.register("nightly", spec())
    with pytest.raises(Conflict):
        state.manifests.register("nightly", spec())
    first = state.start_manifest("nightly")
    assert state.start_manifest("nightly") is first
    state.begin_stop(first, TerminationReason.STOPPED_BY_USER)
    second = state.start_manifest("nightly")
    assert second is not first
    state.unregister_manifest("nightly")
    assert second.is_live
    state.manifests.register("nightly", spec())
    assert state.clusters.live_of("nightly") is None


def test_unknown_id_is_not_found(state: State) -> None:
    for objects in (state.clusters, state.queries):
        with pytest.raises(NotFound, match="does not exist"):
            objects.find(uuid4())


def test_oldest_ended_queries_and_stopped_clusters_are_dropped(
    state: State, clock: StoppedClock
) -> None:
    live = state.clusters.start(spec())
    unfinished = submit(state, live.id)
    for _ in range(MAX_STOPPED_CLUSTERS + 3):
        cluster = state.clusters.start(spec())
        state.begin_stop(cluster, TerminationReason.STOPPED_BY_USER)
        state.clusters.end_stop(cluster)
    ended = [submit(state, live.id) for _ in range(MAX_ENDED_QUERIES + 2)]
    for query in ended:
        state.cancel(query.id)

    assert state.forget_oldest() == [ended[0].id, ended[1].id]
    assert state.forget_oldest() == []

    clock.advance(timedelta(seconds=1))
    state.cancel(unfinished.id)
    unfinished = submit(state, live.id)
    assert state.forget_oldest() == [ended[2].id], "the first to be submitted was the last to end"
    assert len(state.queries.by_id) == MAX_ENDED_QUERIES + 1
    assert unfinished.id in state.queries.by_id
    assert len(state.clusters.by_id) == MAX_STOPPED_CLUSTERS + 1
    assert live.id in state.clusters.by_id
    assert cluster.id in state.clusters.by_id


def test_cluster_of_a_stored_query_is_not_dropped(state: State) -> None:
    first = state.clusters.start(spec())
    query = submit(state, first.id)
    for cluster in [
        first,
        *(state.clusters.start(spec()) for _ in range(MAX_STOPPED_CLUSTERS + 1)),
    ]:
        state.begin_stop(cluster, TerminationReason.STOPPED_BY_USER)
        state.clusters.end_stop(cluster)
    state.forget_oldest()
    assert state.queries.find(query.id).cluster_id in state.clusters.by_id
