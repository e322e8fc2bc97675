"""`deferral.py`, `in_worker.py`: where and how long a task waits."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pkgutil import resolve_name
from types import ModuleType, SimpleNamespace
from typing import Any

import polars as pl
import pytest
from airflow.sdk import DAG, get_current_context
from airflow.sdk.exceptions import AirflowTaskTimeout, TaskDeferred
from airflow.sdk.serde import deserialize, serialize

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import clusters, shared_cluster, use_cluster
from polars_remote.cloud.client import get_cluster_id
from polars_remote.clusters import start_and_wait
from polars_remote.errors import ClusterNotStartedError, QueryLostError, TakenOverError
from polars_remote.ownership.kills import TaskKilled
from polars_remote.ownership.scope import current_scope
from polars_remote.waiting import deferral, in_worker
from polars_remote.waiting.triggers import ClusterTrigger, QueryTrigger
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, TriedTask, deferral_of, kill

FILE = "s3://your-bucket/results/two.parquet"
OTHER_FILE = "s3://your-bucket/results/other.parquet"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})
CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}
OTHER_CLUSTER = {**CLUSTER, "name": "warehouse"}
HELD = timedelta(minutes=1)
STARTUP = timedelta(minutes=5)
HOUR = timedelta(hours=1)


class Clock:
    """Clock of a task that checks its deadline or is deferred."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def time(self) -> float:
        return time.time() + self._ahead

    def advance(self, by: timedelta) -> None:
        self._ahead += by.total_seconds()


@pytest.fixture(autouse=True)
def defer_at_once(pc: ModuleType, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defer a waiting task at once."""
    monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deferral, "time", clock)
    return clock


@pytest.fixture
def hold(emulator: RunningEmulator) -> Callable[[], None]:
    """Hold the next query until `end_held`."""
    return lambda: emulator.add_fault("SubmitQuery", "query_takes", seconds=HELD.total_seconds())


@pytest.fixture
def end_held(emulator: RunningEmulator) -> Callable[[], None]:
    def end() -> None:
        emulator.advance_clock(HELD)
        eventually(lambda: not {"Scheduled", "InProgress"} & set(query_statuses(emulator)))

    return end


@pytest.fixture
def start_slowly(emulator: RunningEmulator) -> Callable[[], None]:
    """Hold the start of the next cluster until `end_start_up`."""
    return lambda: emulator.add_fault(
        "POST manifest/start", "startup_takes", seconds=STARTUP.total_seconds()
    )


@pytest.fixture
def end_start_up(emulator: RunningEmulator) -> Callable[[], None]:
    def end() -> None:
        emulator.advance_clock(STARTUP)
        eventually(lambda: "Starting" not in cluster_statuses(emulator))

    return end


def sink(ctx: Any, uri: str = FILE) -> Any:
    return TWO_ROWS.remote(ctx).single_node().sink_parquet(uri)


def ask() -> Any:
    with use_cluster(CLUSTER) as ctx:
        return sink(ctx)


@pytest.fixture
def run_cluster(start_try: StartTry) -> Callable[[dict[str, Any]], None]:
    """Start a cluster that has no user."""

    def run(cluster: dict[str, Any]) -> None:
        with start_try(task_id="other"), use_cluster(cluster, stop=False) as ctx:
            start_and_wait(current_scope(), ctx)

    return run


def arguments_of(trigger: Any) -> dict[str, Any]:
    """Return a trigger's arguments as Airflow stores them."""
    _, arguments = trigger.serialize()
    return dict(arguments)


def trigger_of(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return the trigger of a try that must be deferred."""
    return deferral_of(run, *args, **options).trigger


def resume_stored(task: TriedTask, deferred: TaskDeferred) -> Any:
    """Resume the task with the deferral that Airflow itself has stored."""
    return task._resume("resume", {**(deferred.kwargs or {}), "event": {}})


def find(emulator: RunningEmulator, manifest: str) -> list[str]:
    """Return the statuses of the manifest's clusters."""
    clusters = emulator.state()["clusters"]
    return [each["status"] for each in clusters if each["manifest"] == manifest]


def stop(emulator: RunningEmulator, cluster_id: str) -> None:
    emulator.call("POST", f"compute/{cluster_id}/stop")


def stop_all(emulator: RunningEmulator) -> None:
    for cluster in emulator.state()["clusters"]:
        stop(emulator, cluster["id"])


# Triggers


def defer_for_query(emulator: RunningEmulator) -> tuple[TriedTask, TaskDeferred]:
    emulator.add_fault("SubmitQuery", "query_takes", seconds=HELD.total_seconds())
    task = TriedTask(ask, execution_timeout=HOUR)
    return task, deferral_of(task.run)


def defer_for_cluster(emulator: RunningEmulator) -> tuple[TriedTask, TaskDeferred]:
    emulator.add_fault("POST manifest/start", "startup_takes", seconds=STARTUP.total_seconds())
    task = TriedTask(ask, execution_timeout=HOUR)
    return task, deferral_of(task.run)


@pytest.mark.parametrize(
    ("defer", "trigger_class"),
    [(defer_for_query, QueryTrigger), (defer_for_cluster, ClusterTrigger)],
)
def test_a_trigger_is_stored_and_found_again_and_holds_no_secret(
    pc: ModuleType,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    defer: Callable[[RunningEmulator], tuple[TriedTask, TaskDeferred]],
    trigger_class: type,
) -> None:
    from polars_cloud.constants import API_CLIENT

    _, deferred = defer(emulator)
    assert deferred.method_name == "resume"
    class_path, kwargs = deferred.trigger.serialize()
    module, _, name = class_path.rpartition(".")
    assert resolve_name(f"{module}:{name}") is trigger_class
    stored: Any = json.dumps(serialize(kwargs))
    again: Any = trigger_class(**deserialize(json.loads(stored)))  # type: ignore[arg-type]
    assert again.serialize() == (class_path, kwargs)

    secret = emulator.environment["POLARS_CLOUD_CLIENT_SECRET"]
    token = API_CLIENT.get_auth_header().removeprefix("Bearer ")
    assert len(token) > len(secret) > 10
    for text in (stored, *supervisor.variables.values()):
        assert secret not in text
        assert token not in text
        assert "eyJ" not in text  # the prefix of each token


def test_a_trigger_gets_the_query_and_its_cluster(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    task, deferred = defer_for_query(emulator)
    _, kwargs = deferred.trigger.serialize()
    [query] = emulator.state()["queries"]
    [query_kwargs] = kwargs["queries"]
    assert (query_kwargs["destination"], query_kwargs["query_id"]) == (FILE, query["id"])
    assert query_kwargs["cluster_id"] == emulator.state()["clusters"][0]["id"]
    assert query_kwargs["page"].endswith(query["id"])
    assert kwargs["conn_id"] == "polars_cloud"
    assert kwargs["task_key"] in supervisor.variables
    assert kwargs["task_key"].endswith(str(task.ti.id))


def test_a_trigger_gets_the_cluster_that_starts(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    _, deferred = defer_for_cluster(emulator)
    _, kwargs = deferred.trigger.serialize()
    assert kwargs["cluster_id"] == emulator.state()["clusters"][0]["id"]
    assert kwargs["task_key"] in supervisor.variables


def test_the_cluster_that_starts_and_the_deferred_task_are_on_record(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    defer_for_cluster(emulator)
    assert cluster_statuses(emulator) == ["Starting"]
    assert [entry["manifest"] for entry in entries(supervisor, "cluster")] == ["shop"]
    assert len(entries(supervisor, "task")) == 1
    assert supervisor.states["manual__1"]["run_query"] == "deferred"


def test_a_resumed_task_logs_in_with_its_own_connection(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    hold: Callable[[], None],
    end_held: Callable[[], None],
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", os.environ["AIRFLOW_CONN_POLARS_CLOUD"])
    monkeypatch.delenv("AIRFLOW_CONN_POLARS_CLOUD")
    task = TriedTask(ask, conn_id="nightly")
    hold()
    assert trigger_of(task.run).conn_id == "nightly"
    end_held()
    emulator.add_fault("GET workspace", "tokens_expire")
    assert task.resume() == [FILE]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


# How long


def test_airflow_gives_a_trigger_more_time_than_it_takes(
    emulator: RunningEmulator, clock: Clock
) -> None:
    before = clock.time()
    _, deferred = defer_for_query(emulator)
    after = clock.time()
    trigger: Any = deferred.trigger
    assert before < trigger.not_before < trigger.resume_at < trigger.deadline
    assert before + deferral.SHORTEST_TRIGGER_TIMEOUT <= trigger.resume_at
    assert trigger.resume_at <= after + deferral.SHORTEST_TRIGGER_TIMEOUT
    gives_up_at = before + deferred.timeout.total_seconds()
    assert trigger.resume_at < gives_up_at < after + deferral.SHORTEST_TRIGGER_TIMEOUT + 2 * 60


@pytest.mark.parametrize(("start_up", "delay"), [(1, 6), (9, 9), (600, 12)])
def test_a_trigger_waits_longer_before_it_fires_where_the_worker_was_slow_to_start(
    hold: Callable[[], None], clock: Clock, start_up: int, delay: int
) -> None:
    def start_slowly() -> Any:
        current_scope().started_at = time.time() - start_up
        return ask()

    hold()
    before = clock.time()
    trigger = trigger_of(TriedTask(start_slowly).run)
    took = clock.time() - before
    assert before + delay <= trigger.not_before <= before + delay + 2 * took


def test_a_query_that_runs_on_is_deferred_again_for_as_long_as_it_has_run(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    clock: Clock,
    hold: Callable[[], None],
) -> None:
    task = TriedTask(ask)
    hold()
    first = trigger_of(task.run)
    [entry] = entries(supervisor, "task")
    since = entry["waits_for"]["since"]
    assert first.deadline is None

    timeouts = [first.resume_at - clock.time()]
    for _ in range(5):
        clock.advance(timedelta(seconds=timeouts[-1]))
        trigger = trigger_of(task.resume)
        assert trigger.queries == first.queries
        assert trigger.resume_at >= first.resume_at
        timeouts.append(trigger.resume_at - clock.time())
        [entry] = entries(supervisor, "task")
        assert entry["waits_for"]["since"] == since
    # Each interval equals the sum of those before it, within bounds.
    assert timeouts == pytest.approx([300, 300, 600, 1200, 1800, 1800], abs=60)
    eventually(lambda: query_statuses(emulator) == ["InProgress"])
    assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
    assert calls(emulator, "SubmitQuery") == 1


def test_no_trigger_outlasts_the_deadline(
    emulator: RunningEmulator, clock: Clock, hold: Callable[[], None]
) -> None:
    task = TriedTask(ask, execution_timeout=timedelta(minutes=4))
    hold()
    trigger = trigger_of(task.run)
    assert trigger.resume_at == trigger.deadline
    assert trigger.deadline == pytest.approx(clock.time() + 4 * 60, abs=60)


def test_the_deadline_is_that_of_the_first_start_however_often_the_task_is_deferred(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    clock: Clock,
    hold: Callable[[], None],
) -> None:
    task = TriedTask(ask, execution_timeout=HOUR)
    hold()
    deadlines = {trigger_of(task.run).deadline}
    for _ in range(2):
        clock.advance(0.4 * HOUR)
        deadlines.add(trigger_of(task.resume).deadline)
    assert len(deadlines) == 1
    eventually(lambda: query_statuses(emulator) == ["InProgress"])
    clock.advance(0.4 * HOUR)
    with pytest.raises(AirflowTaskTimeout, match="exceeded its execution_timeout of 1:00:00"):
        task.resume()
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_task_that_is_out_of_time_while_no_trigger_runs_cancels_its_query(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    clock: Clock,
    hold: Callable[[], None],
) -> None:
    task = TriedTask(ask, execution_timeout=HOUR)
    hold()
    deferral_of(task.run)
    clock.advance(2 * HOUR)
    with pytest.raises(AirflowTaskTimeout):
        task.resume_without_trigger()
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_results_that_came_in_time_are_taken_after_the_deadline(
    clock: Clock, hold: Callable[[], None], end_held: Callable[[], None]
) -> None:
    task = TriedTask(ask, execution_timeout=HOUR)
    hold()
    deferral_of(task.run)
    end_held()
    clock.advance(2 * HOUR)
    assert task.resume({"results": {FILE: {"location": [FILE], "rows": 2}}}) == [FILE]


def test_a_task_that_is_out_of_time_while_its_cluster_starts_stops_the_cluster(
    emulator: RunningEmulator, supervisor: Supervisor, clock: Clock
) -> None:
    task, _ = defer_for_cluster(emulator)
    clock.advance(2 * HOUR)
    with pytest.raises(AirflowTaskTimeout):
        task.resume()
    assert cluster_statuses(emulator) == ["Stopped"]
    assert query_statuses(emulator) == []
    assert supervisor.variables == {}


def test_a_task_that_waits_in_its_worker_without_a_trigger_keeps_its_deadline(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    clock: Clock,
    hold: Callable[[], None],
) -> None:
    task = TriedTask(ask, execution_timeout=HOUR)
    hold()
    deferral_of(task.run)
    clock.advance(0.5 * HOUR)
    with (
        once_it_waits(emulator, lambda: clock.advance(HOUR)),
        pytest.raises(AirflowTaskTimeout, match="exceeded its execution_timeout of 1:00:00"),
    ):
        task.resume_without_trigger()
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


# In the worker


@contextmanager
def once_it_waits(emulator: RunningEmulator, act: Callable[[], None]) -> Iterator[None]:
    """Call a function when the body waits for a query in its worker."""
    asked = calls(emulator, "GetQueryResult")

    def wait_and_act() -> None:
        eventually(lambda: calls(emulator, "GetQueryResult") > asked)
        act()

    with ThreadPoolExecutor() as background:
        acted = background.submit(wait_and_act)
        yield
        acted.result()


def test_the_end_of_a_query_is_seen_without_a_poll(
    emulator: RunningEmulator,
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
    hold: Callable[[], None],
    end_held: Callable[[], None],
) -> None:
    monkeypatch.setattr(in_worker, "FIRST_POLL_SECONDS", HOUR.total_seconds())
    monkeypatch.setattr(in_worker, "LONGEST_POLL_SECONDS", 0.1)  # between long polls
    hold()
    with start_try(), use_cluster(CLUSTER, stop=False) as ctx, once_it_waits(emulator, end_held):
        asked = calls(emulator, "GetQueryStatus")
        assert sink(ctx).await_result().location == [FILE]
    assert query_statuses(emulator) == ["Success"]
    assert calls(emulator, "GetQueryStatus") == asked


def test_the_end_of_a_query_is_seen_although_the_call_that_waits_for_it_was_cut(
    emulator: RunningEmulator,
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
    hold: Callable[[], None],
    end_held: Callable[[], None],
) -> None:
    monkeypatch.setattr(in_worker, "LONGEST_POLL_SECONDS", HOUR.total_seconds())
    hold()
    emulator.add_fault("GetQueryResult", "grpc_error", code="ABORTED", message="cut")
    with start_try(), use_cluster(CLUSTER, stop=False) as ctx, once_it_waits(emulator, end_held):
        assert sink(ctx).await_result().location == [FILE]
    assert calls(emulator, "GetQueryStatus") > 0


# A cluster that starts


def test_a_task_whose_cluster_has_started_runs_from_its_beginning_and_submits_once(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    start_slowly: Callable[[], None],
    end_start_up: Callable[[], None],
    hold: Callable[[], None],
    end_held: Callable[[], None],
) -> None:
    begun: list[int] = []

    def ask_and_count() -> Any:
        begun.append(len(query_statuses(emulator)))
        return ask()

    task = TriedTask(ask_and_count)
    start_slowly()
    assert isinstance(trigger_of(task.run), ClusterTrigger)
    end_start_up()
    hold()
    assert isinstance(trigger_of(task.resume), QueryTrigger)
    end_held()
    assert task.resume() == [FILE]
    assert begun == [0, 0]
    assert query_statuses(emulator) == ["Success"]
    assert calls(emulator, "start") == 1
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_task_whose_cluster_is_still_starting_is_deferred_again(
    emulator: RunningEmulator,
    clock: Clock,
    supervisor: Supervisor,
) -> None:
    task, deferred = defer_for_cluster(emulator)
    first: Any = deferred.trigger
    [entry] = entries(supervisor, "task")
    clock.advance(timedelta(minutes=10))
    second = trigger_of(task.resume)
    assert second.cluster_id == first.cluster_id
    assert second.deadline == first.deadline
    assert second.resume_at > first.resume_at
    [later_entry] = entries(supervisor, "task")
    assert later_entry["waits_for"] == entry["waits_for"]
    assert cluster_statuses(emulator) == ["Starting"]


def test_a_cluster_that_has_not_started_is_an_error_with_its_reason_and_used_no_longer(
    emulator: RunningEmulator, supervisor: Supervisor, start_slowly: Callable[[], None]
) -> None:
    task, _ = defer_for_cluster(emulator)
    stop_all(emulator)
    start_slowly()
    with pytest.raises(ClusterNotStartedError, match="did not start: no machines left"):
        task.resume({"failed": "no machines left"})
    assert query_statuses(emulator) == []
    assert set(cluster_statuses(emulator)) == {"Stopped"}
    assert supervisor.variables == {}


@pytest.mark.parametrize("stop", [True, False])
def test_a_cluster_that_has_not_started_is_named_and_not_started_a_second_time(
    emulator: RunningEmulator, start_slowly: Callable[[], None], stop: bool
) -> None:
    def ask() -> Any:
        with use_cluster(CLUSTER, stop=stop) as ctx:
            return sink(ctx)

    task = TriedTask(ask)
    start_slowly()
    cluster_id = trigger_of(task.run).cluster_id
    stop_all(emulator)
    start_slowly()
    with pytest.raises(ClusterNotStartedError, match="did not start: no machines left") as raised:
        task.resume({"failed": "no machines left"})
    assert cluster_id in str(raised.value)
    assert calls(emulator, "start") == 1


def test_a_query_on_another_cluster_is_canceled_when_the_next_does_not_start(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    run_cluster: Callable[[dict[str, Any]], None],
    start_slowly: Callable[[], None],
) -> None:
    def ask_then_start() -> Any:
        with use_cluster(CLUSTER) as shop:
            first = sink(shop)
            with use_cluster(OTHER_CLUSTER) as warehouse:
                return [first, sink(warehouse, OTHER_FILE)]

    run_cluster(CLUSTER)
    emulator.add_fault("SubmitQuery", "query_hangs")
    task = TriedTask(ask_then_start)
    start_slowly()
    deferral_of(task.run)
    eventually(lambda: query_statuses(emulator) == ["InProgress"])
    [warehouse] = (each for each in emulator.state()["clusters"] if each["manifest"] == "warehouse")
    stop(emulator, warehouse["id"])
    start_slowly()
    with pytest.raises(ClusterNotStartedError, match="did not start: no machines left"):
        task.resume({"failed": "no machines left"})
    assert query_statuses(emulator) == ["Canceled"]
    assert set(cluster_statuses(emulator)) == {"Stopped"}
    assert supervisor.variables == {}


def test_the_next_try_starts_a_cluster_that_has_not_started(
    emulator: RunningEmulator, supervisor: Supervisor, start_slowly: Callable[[], None]
) -> None:
    task, _ = defer_for_cluster(emulator)
    stop_all(emulator)
    start_slowly()
    with pytest.raises(ClusterNotStartedError, match="no machines left"):
        task.resume({"failed": "no machines left"})
    start_slowly()
    assert isinstance(trigger_of(task.run, 2), ClusterTrigger)
    assert cluster_statuses(emulator)[-1] == "Starting"


def test_a_query_that_was_submitted_before_another_cluster_started_is_not_submitted_twice(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    run_cluster: Callable[[dict[str, Any]], None],
    start_slowly: Callable[[], None],
    end_start_up: Callable[[], None],
) -> None:
    def ask_two_clusters() -> Any:
        with use_cluster(pair) as shop:
            first = [sink(shop), TWO_ROWS.remote(shop).single_node().execute(blocking=False)]
        with use_cluster(OTHER_CLUSTER) as warehouse:
            return [*first, sink(warehouse, OTHER_FILE)]

    pair = {**CLUSTER, "cluster_size": 2}
    run_cluster(pair)
    task = TriedTask(ask_two_clusters)
    emulator.add_fault("SubmitQuery", "query_takes", times=2, seconds=STARTUP.total_seconds())
    start_slowly()
    trigger = trigger_of(task.run)
    assert isinstance(trigger, ClusterTrigger)
    assert find(emulator, "warehouse") == ["Starting"]
    assert len(query_statuses(emulator)) == 2
    eventually(lambda: find(emulator, "shop") == ["Running"])

    end_start_up()
    eventually(lambda: query_statuses(emulator) == ["Success"] * 2)
    emulator.add_fault("SubmitQuery", "query_takes", seconds=HELD.total_seconds())
    assert isinstance(trigger_of(task.resume), QueryTrigger)
    emulator.advance_clock(HELD)
    eventually(lambda: query_statuses(emulator) == ["Success"] * 3)
    first, temporary, other = task.resume()
    assert (first, other) == ([FILE], [OTHER_FILE])
    assert len(temporary) == 1
    assert calls(emulator, "SubmitQuery") == 3
    assert set(cluster_statuses(emulator)) == {"Stopped"}
    assert supervisor.variables == {}


def test_a_task_that_loses_its_trigger_waits_for_its_cluster_in_its_worker(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    start_slowly: Callable[[], None],
) -> None:
    looks = []

    def sleep(_: float) -> None:
        """Poll the cluster, which does not run yet."""
        looks.append(cluster_statuses(emulator))
        if len(looks) == 2:
            emulator.advance_clock(STARTUP)
            eventually(lambda: cluster_statuses(emulator) == ["Idle"])

    monkeypatch.setattr(clusters, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    task = TriedTask(ask)
    start_slowly()
    deferral_of(task.run)
    assert task.resume_without_trigger() == [FILE]
    assert looks == [["Starting"]] * 2
    assert "No triggerer watches this task (Trigger timeout)" in caplog.text
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_plain_task_waits_for_its_cluster_in_its_worker(
    emulator: RunningEmulator,
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
    start_slowly: Callable[[], None],
) -> None:
    def sleep(_: float) -> None:
        emulator.advance_clock(STARTUP)
        eventually(lambda: cluster_statuses(emulator) == ["Idle"])

    monkeypatch.setattr(clusters, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    start_slowly()
    with start_try(), use_cluster(CLUSTER) as ctx:
        assert sink(ctx).await_result().location == [FILE]
        assert get_cluster_id(ctx) == emulator.state()["clusters"][0]["id"]
    assert cluster_statuses(emulator) == ["Stopped"]


# start_cluster


class StartCluster:
    """The setup task of a shared cluster."""

    def __init__(self, start_try: StartTry) -> None:
        self._start_try = start_try
        self._ti: Any = None

    def run(self, event: dict[str, Any] | None = None) -> Any:
        """Start the task, or resume it with an event."""
        with DAG("shop", schedule=None) as dag, shared_cluster(CLUSTER):
            pass
        operator: Any = dag.get_task("start_cluster")
        resumes = None if event is None else self._ti.id
        with self._start_try(task=operator, resumes=resumes, scope=False) as self._ti:
            context = get_current_context()
            if event is None:
                return operator.execute(context)
            return operator.resume_execution("resume", {"event": event}, context)


def test_a_shared_cluster_is_started_without_a_worker_slot(
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    start_slowly: Callable[[], None],
    end_start_up: Callable[[], None],
) -> None:
    task = StartCluster(start_try)
    start_slowly()
    trigger = trigger_of(task.run)
    assert isinstance(trigger, ClusterTrigger)
    [entry] = entries(supervisor, "task")
    assert len(entry["kept"]) == 1
    end_start_up()
    assert task.run({}) is None
    assert cluster_statuses(emulator) == ["Idle"]
    assert calls(emulator, "start") == 1
    # Only the run's use of the cluster stays on record.
    [use] = entries(supervisor, "cluster")
    assert use["manifest"] == "shop"
    assert entries(supervisor, "task") == []


def test_a_shared_cluster_that_does_not_start_is_used_by_nobody(
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    start_slowly: Callable[[], None],
) -> None:
    task = StartCluster(start_try)
    start_slowly()
    deferral_of(task.run)
    stop_all(emulator)
    start_slowly()
    with pytest.raises(ClusterNotStartedError, match="did not start: no machines left"):
        task.run({"failed": "no machines left"})
    assert set(cluster_statuses(emulator)) == {"Stopped"}
    assert supervisor.variables == {}


# SIGTERM


@pytest.mark.parametrize("defer", [defer_for_query, defer_for_cluster])
def test_a_user_who_ends_a_task_while_it_is_being_deferred_ends_all_that_it_has_started(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    defer: Callable[[RunningEmulator], tuple[TriedTask, TaskDeferred]],
) -> None:
    task, _ = defer(emulator)
    supervisor.states["manual__1"]["run_query"] = "failed"
    with pytest.raises(TaskKilled):
        task.operator.on_kill()
    assert query_statuses(emulator) == (["Canceled"] if defer is defer_for_query else [])
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("defer", [defer_for_query, defer_for_cluster])
@pytest.mark.parametrize("state", ["running", "deferred", None])
def test_a_worker_that_is_shut_down_while_it_defers_a_task_ends_nothing(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    defer: Callable[[RunningEmulator], tuple[TriedTask, TaskDeferred]],
    state: str | None,
) -> None:
    task, _ = defer(emulator)
    supervisor.states["manual__1"]["run_query"] = state
    with pytest.raises(TaskKilled):
        task.operator.on_kill()
    assert [query["cancels"] for query in emulator.state()["queries"]] in ([0], [])
    assert cluster_statuses(emulator) != ["Stopped"]
    assert len(supervisor.variables) == 2


# The next try


@pytest.mark.parametrize("next_cluster", [CLUSTER, OTHER_CLUSTER])
def test_a_cleared_deferred_task_submits_again_and_the_first_cluster_is_stopped_in_the_end(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    hold: Callable[[], None],
    end_held: Callable[[], None],
    next_cluster: dict[str, Any],
) -> None:
    cluster = CLUSTER

    def ask_of_the_cluster() -> Any:
        with use_cluster(cluster) as ctx:
            return sink(ctx)

    task = TriedTask(ask_of_the_cluster)
    hold()
    deferral_of(task.run)
    cluster = next_cluster
    hold()
    deferral_of(task.run, 2, clear_number=1)
    eventually(lambda: query_statuses(emulator) == ["Canceled", "InProgress"])
    assert len(entries(supervisor, "task")) == 1
    end_held()
    assert task.resume() == [FILE]
    assert query_statuses(emulator) == ["Canceled", "Success"]
    assert set(cluster_statuses(emulator)) == {"Stopped"}
    assert supervisor.variables == {}


def test_a_deferred_task_whose_cluster_was_starting_when_it_was_cleared_leaves_no_cluster_behind(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    defer_for_cluster(emulator)
    assert TriedTask(lambda: None).run(2, clear_number=1) is None
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("crashed", ["deferred", "resumed"])
def test_the_try_after_a_crash_resumes_the_query_of_a_deferred_task(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    hold: Callable[[], None],
    end_held: Callable[[], None],
    crashed: str,
) -> None:
    task = TriedTask(ask, execution_timeout=HOUR)
    hold()
    first = trigger_of(task.run)
    if crashed == "resumed":
        deferral_of(task.resume)
    second = trigger_of(task.run, 2)
    assert [each["query_id"] for each in second.queries] == [
        each["query_id"] for each in first.queries
    ]
    assert second.deadline > first.deadline
    assert second.task_key != first.task_key
    assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
    assert len(entries(supervisor, "task")) == 1
    end_held()
    assert task.resume() == [FILE]
    assert calls(emulator, "SubmitQuery") == 1
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_the_query_of_a_killed_worker_is_taken_up_and_deferred_by_the_next_try(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    hold: Callable[[], None],
    end_held: Callable[[], None],
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER) as ctx:
            yield sink(ctx)

    hold()
    kill(body)
    task = TriedTask(ask)
    deferral_of(task.run, 2)
    end_held()
    assert task.resume() == [FILE]
    assert calls(emulator, "SubmitQuery") == 1
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_the_cluster_of_a_query_is_stopped_although_the_next_try_does_not_get_as_far(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    hold: Callable[[], None],
) -> None:
    task = TriedTask(ask)
    hold()
    deferral_of(task.run)
    eventually(lambda: query_statuses(emulator) == ["InProgress"])
    emulator.add_fault("GET manifest/find", "http_error", status=403, message="for good")
    with pytest.raises(ValueError, match="for good"):
        task.run(2)
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_try_that_was_deferred_owns_nothing_once_the_next_one_has_taken_over(
    emulator: RunningEmulator,
    hold: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    late, task = TriedTask(ask), TriedTask(ask)
    hold()
    deferred = deferral_of(late.run)
    deferral_of(task.run, 2)
    with pytest.raises(QueryLostError, match=f"record of the query for {FILE} is gone"):
        resume_stored(late, deferred)
    with pytest.raises(QueryLostError, match="record of this task is gone"):
        late.resume_without_trigger()
    assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
    eventually(lambda: query_statuses(emulator) == ["InProgress"])
    eventually(lambda: cluster_statuses(emulator) == ["Running"])


def test_a_try_whose_cluster_was_starting_starts_nothing_once_the_next_one_has_taken_over(
    emulator: RunningEmulator, supervisor: Supervisor, end_start_up: Callable[[], None]
) -> None:
    late, deferred = defer_for_cluster(emulator)
    deferral_of(TriedTask(ask).run, 2)
    before = dict(supervisor.variables)
    end_start_up()
    with pytest.raises(TakenOverError):
        resume_stored(late, deferred)
    assert query_statuses(emulator) == []
    assert cluster_statuses(emulator) == ["Idle"]
    assert supervisor.variables == before
