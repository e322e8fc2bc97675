"""The life cycle of a cluster, with a clock that the test sets."""

from datetime import timedelta

from emulator.tests.states import MINUTE, OUTCOME, StoppedClock, new_state, spec, submit
from polars_cloud_emulator.model.clusters import ClusterStatus
from polars_cloud_emulator.model.state import State


def test_cluster_is_idle_too_long_exactly_at_its_timeout(state: State, clock: StoppedClock) -> None:
    short = state.clusters.start(spec(idle_timeout_mins=10))
    default = state.clusters.start(spec())
    clock.advance(10 * MINUTE - timedelta.resolution)
    assert state.clusters.idle_too_long() == []
    clock.advance(timedelta.resolution)
    assert state.clusters.idle_too_long() == [short.id]
    query = submit(state, short.id)
    state.start_next(short.id, 1)
    clock.advance(49 * MINUTE)
    assert state.clusters.idle_too_long() == []
    state.succeed(query, OUTCOME)
    clock.advance(MINUTE)
    assert state.clusters.idle_too_long() == [default.id]


def test_starting_cluster_is_ready_after_the_delay_and_idle_from_then_on(
    clock: StoppedClock,
) -> None:
    state = new_state(clock)
    cluster = state.clusters.start(spec(idle_timeout_mins=10))
    state.clusters.postpone(cluster, 2 * MINUTE)
    query = submit(state, cluster.id)
    assert state.start_next(cluster.id, 2) is None
    clock.advance(2 * MINUTE - timedelta.resolution)
    assert (state.clusters.become_ready(), cluster.status) == ([], ClusterStatus.STARTING)
    clock.advance(timedelta.resolution)
    assert (state.clusters.become_ready(), cluster.status) == ([cluster.id], ClusterStatus.IDLE)
    assert state.clusters.become_ready() == []
    clock.advance(9 * MINUTE)
    assert state.clusters.idle_too_long() == []
    assert state.start_next(cluster.id, 2) is query
