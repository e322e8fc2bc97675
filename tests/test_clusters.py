"""`clusters.py`: no cluster outlives its work, and none is stopped under somebody else."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk import DAG, task

from include.polars_remote import clusters, ledger, releases
from include.polars_remote.client_internals import get_cluster_id
from include.polars_remote.clusters import compute_context, use_cluster
from include.polars_remote.ledger import Owner
from include.polars_remote.manifests import ensure_manifest
from include.polars_remote.queries import leave, run_query, submit, wait_for
from include.polars_remote.shared_clusters import shared_cluster, start_cluster, stop_cluster
from polars_cloud_emulator.testing import RunningEmulator, eventually
from tests.manifest_body import MANIFEST_BODY
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, freeze, kill

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}
OTHER_CLUSTER = {**CLUSTER, "name": "warehouse"}
FILE = "s3://your-bucket/results/one.parquet"
OTHER_FILE = "s3://your-bucket/results/other.parquet"
ONE_ROW = pl.LazyFrame({"x": [1]})
STARTUP = timedelta(minutes=5)
OUTAGES = {
    "500": {"kind": "http_error", "status": 500},
    "503": {"kind": "http_error", "status": 503},
    "429": {"kind": "http_error", "status": 429},
    "reset": {"kind": "connection_reset"},
    "lost": {"kind": "answer_lost"},
}


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    """The log tells what it tells in Airflow."""
    caplog.set_level("INFO", "include")


@pytest.fixture
def short_wind_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is running is soon taken for one on which somebody else's query runs."""
    monkeypatch.setattr(releases, "WIND_UP_SECONDS", 0.1)


@pytest.fixture
def by_name(pc: ModuleType) -> Callable[[], Any]:
    """The cluster's context as somebody makes it who knows nothing of the ledger."""
    ensure_manifest(CLUSTER)
    return lambda: pc.ComputeContext(workspace="playground", name="shop")


class Run:
    """A run with a shared cluster: its setup, its teardown, and a task between them."""

    def __init__(self, supervisor: Supervisor, start_try: StartTry, run_id: str) -> None:
        self.run_id = run_id
        self._start_try = start_try
        self.states = supervisor.states[run_id]
        self.states |= {"run_query": None, "stop_cluster": None}

    def start_cluster(self, cluster: dict[str, Any] = CLUSTER) -> None:
        with self._start_try(task_id="start_cluster", run_id=self.run_id, scope=False):
            start_cluster.function(cluster, "polars_cloud")

    def stop_cluster(self, cluster: dict[str, Any] = CLUSTER) -> None:
        with self._start_try(task_id="stop_cluster", run_id=self.run_id, scope=False):
            stop_cluster.function(cluster["name"], "start_cluster", "polars_cloud")

    def query(self) -> None:
        with self._start_try(run_id=self.run_id), use_cluster(CLUSTER) as ctx:
            run_query(ONE_ROW.remote(ctx).single_node().execute)

    def kill_mid_query(self, emulator: RunningEmulator) -> None:
        """The task's only try leaves a query behind that nobody waits for."""

        def body() -> Iterator[None]:
            with use_cluster(CLUSTER) as ctx:
                yield submit_hanging_query(emulator, ctx)

        kill(body, run_id=self.run_id)
        self.states["run_query"] = "failed"


@pytest.fixture
def run(pc: ModuleType, supervisor: Supervisor, start_try: StartTry) -> Run:
    return Run(supervisor, start_try, "manual__1")


@pytest.fixture
def other_run(pc: ModuleType, supervisor: Supervisor, start_try: StartTry) -> Run:
    return Run(supervisor, start_try, "manual__2")


def submit_hanging_query(emulator: RunningEmulator, ctx: Any, uri: str = FILE) -> Any:
    emulator.add_fault("SubmitQuery", "query_hangs")
    return submit(ONE_ROW.remote(ctx).single_node().sink_parquet, uri)


def use_from_elsewhere(emulator: RunningEmulator, ctx: Any) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    ONE_ROW.remote(ctx).execute(blocking=False)


def looks_at_the_cluster(emulator: RunningEmulator) -> int:
    return calls(emulator, f"compute/{emulator.state()['clusters'][0]['id']}")


def start_slowly(emulator: RunningEmulator) -> None:
    """Let the manifest's cluster be Starting, as after a worker that was killed meanwhile."""
    emulator.add_fault("POST manifest/start", "startup_takes", seconds=STARTUP.total_seconds())
    versions = {key: MANIFEST_BODY[key] for key in ("python_version", "polars_version")}
    start = {"name": "shop", **versions}
    emulator.call("POST", "manifest/start", start)
    assert cluster_statuses(emulator) == ["Starting"]


# use_cluster


@pytest.mark.usefixtures("ti", "pc")
def test_a_cluster_runs_for_the_body_and_no_longer(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    with use_cluster(CLUSTER) as ctx:
        assert cluster_statuses(emulator) == ["Idle"]
        run_query(ONE_ROW.remote(ctx).execute)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert entries(supervisor, "cluster") == []


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_runs_already_is_used(
    by_name: Callable[[], Any], emulator: RunningEmulator
) -> None:
    by_name().start()
    with use_cluster(CLUSTER) as ctx:
        run_query(ONE_ROW.remote(ctx).execute)
    assert len(cluster_statuses(emulator)) == 1


@pytest.mark.usefixtures("ti", "short_wind_up")
@pytest.mark.parametrize("error", [None, ValueError("mine")])
def test_a_cluster_on_which_somebody_elses_query_runs_is_left_running(
    by_name: Callable[[], Any],
    emulator: RunningEmulator,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
) -> None:
    def use() -> None:
        with use_cluster(CLUSTER):
            use_from_elsewhere(emulator, by_name())
            if error:
                raise error

    if error:
        with pytest.raises(ValueError, match="mine"):
            use()
    else:
        use()
    assert cluster_statuses(emulator) == ["Running"]
    assert "is left running: somebody else's query runs on it" in caplog.text


@pytest.mark.usefixtures("ti")
def test_a_cluster_whose_last_query_is_just_ending_is_stopped(
    by_name: Callable[[], Any], emulator: RunningEmulator
) -> None:
    def release() -> None:
        asked = looks_at_the_cluster(emulator)
        eventually(lambda: looks_at_the_cluster(emulator) > asked)
        emulator.advance_clock(timedelta(minutes=1))

    with ThreadPoolExecutor() as background, use_cluster(CLUSTER):
        emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
        ONE_ROW.remote(by_name()).execute(blocking=False)
        eventually(lambda: query_statuses(emulator) == ["InProgress"])
        released = background.submit(release)
    released.result()
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(143)])
def test_the_bodys_own_error_is_what_the_task_sees(
    emulator: RunningEmulator, error: BaseException
) -> None:
    with pytest.raises(type(error)) as raised, use_cluster(CLUSTER):
        raise error
    assert raised.value is error
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti", "pc")
def test_the_bodys_own_error_survives_a_stop_that_fails(
    emulator: RunningEmulator, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    def use() -> None:
        with use_cluster(CLUSTER):
            fault = {"kind": "http_error", "status": 403, "message": "for good"}
            emulator.add_fault("POST compute/{id}/stop", **fault)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        use()
    assert "it stays on record" in caplog.text
    assert "for good" in caplog.text
    assert len(entries(supervisor, "cluster")) == 1


@pytest.mark.usefixtures("ti", "pc")
def test_a_stop_that_fails_after_a_good_body_is_an_error(emulator: RunningEmulator) -> None:
    with pytest.raises(ValueError, match="for good"), use_cluster(CLUSTER):
        emulator.add_fault("POST compute/{id}/stop", "http_error", status=403, message="for good")


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_has_stopped_by_the_end_is_no_error(
    by_name: Callable[[], Any], emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    with use_cluster(CLUSTER):
        by_name().stop()
    assert cluster_statuses(emulator) == ["Stopped"]
    assert "nothing to stop" in caplog.text


@pytest.mark.usefixtures("ti", "pc")
def test_a_cluster_that_does_not_start_says_why(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    emulator.add_fault("POST manifest/start", "startup_fails", message="no machines left")
    with pytest.raises(RuntimeError, match="no machines left"), use_cluster(CLUSTER):
        raise AssertionError("the body ran")
    assert cluster_statuses(emulator) == ["Failed"]
    assert entries(supervisor, "cluster") == []


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize("use", [use_cluster, compute_context, shared_cluster])
@pytest.mark.parametrize("cluster", [{"cpus": 2, "memory": 4}, {"name": "", "cpus": 2}, "shop"])
def test_a_cluster_without_a_name_is_refused(
    emulator: RunningEmulator, use: Callable[[Any], Any], cluster: Any
) -> None:
    with pytest.raises(ValueError, match="A cluster needs a name"):
        use(cluster).__enter__()
    assert cluster_statuses(emulator) == []


@pytest.mark.usefixtures("ti")
def test_a_query_that_nobody_has_waited_for_is_an_error_at_the_end_of_the_block(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    with pytest.raises(RuntimeError, match="nobody has waited for it"), use_cluster(CLUSTER) as ctx:
        submit_hanging_query(emulator, ctx)
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize("fault", OUTAGES.values(), ids=OUTAGES)
@pytest.mark.parametrize(
    "operation",
    [
        "GET workspace",
        "GET manifest/find",
        "GET compute/{id}",
        "POST manifest/start",
        "POST compute/{id}/stop",
    ],
)
def test_an_outage_at_any_step_is_survived(
    emulator: RunningEmulator, operation: str, fault: dict[str, Any]
) -> None:
    emulator.add_fault(operation, **fault)
    with use_cluster(CLUSTER) as ctx:
        run_query(ONE_ROW.remote(ctx).execute)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert emulator.state()["faults"] == []


# Several clusters, several blocks


@pytest.mark.usefixtures("ti", "pc")
def test_two_clusters_in_one_task_are_kept_apart(emulator: RunningEmulator) -> None:
    with use_cluster(CLUSTER) as first, use_cluster({**OTHER_CLUSTER, "cluster_size": 2}) as second:
        assert get_cluster_id(first) != get_cluster_id(second)
        sizes = {each["manifest"]: each["cluster_size"] for each in emulator.state()["clusters"]}
        assert sizes == {"shop": 1, "warehouse": 2}
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]


def test_the_next_try_of_a_killed_worker_gets_both_its_clusters_back(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    both = (CLUSTER, {**OTHER_CLUSTER, "cluster_size": 2})

    def body() -> Iterator[list[Any]]:
        with use_cluster(both[0]) as first, use_cluster(both[1]) as second:
            yield [get_cluster_id(first), get_cluster_id(second)]

    before = kill(body)
    with start_try(2), use_cluster(both[0]) as first, use_cluster(both[1]) as second:
        assert [get_cluster_id(first), get_cluster_id(second)] == before
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]


@pytest.mark.usefixtures("ti", "pc")
def test_the_end_of_one_clusters_block_leaves_the_query_on_another_alone(
    emulator: RunningEmulator,
) -> None:
    def fail_beside(query: Any) -> None:
        with use_cluster(CLUSTER) as ctx:
            submit_hanging_query(emulator, ctx, OTHER_FILE)
            raise KeyError("mine")

    with use_cluster(OTHER_CLUSTER) as ctx:
        query = submit_hanging_query(emulator, ctx)
        with pytest.raises(KeyError, match="mine"):
            fail_beside(query)
        assert query_statuses(emulator) == ["InProgress", "Canceled"]
        states = {each["manifest"]: each["status"] for each in emulator.state()["clusters"]}
        assert states == {"shop": "Stopped", "warehouse": "Running"}
        query.cancel()  # nobody has to wait for it before the cluster stops
        leave(query)


@pytest.mark.usefixtures("ti", "pc")
def test_blocks_of_one_cluster_inside_each_other_release_it_once(
    emulator: RunningEmulator,
) -> None:
    with use_cluster(CLUSTER) as ctx:
        with use_cluster(CLUSTER) as inner:
            assert get_cluster_id(inner) == get_cluster_id(ctx)
        assert cluster_statuses(emulator) == ["Idle"]
        run_query(ONE_ROW.remote(ctx).execute)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert calls(emulator, "stop") == 1


@pytest.mark.usefixtures("ti", "pc")
def test_blocks_of_one_cluster_after_each_other_start_it_twice(emulator: RunningEmulator) -> None:
    for _ in range(2):
        with use_cluster(CLUSTER) as ctx:
            run_query(ONE_ROW.remote(ctx).execute)
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]


# Tries


def test_a_killed_worker_hands_its_cluster_over_to_the_next_try(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER) as ctx:
            yield get_cluster_id(ctx)

    first = kill(body)
    with start_try(2), use_cluster(CLUSTER) as ctx:
        assert get_cluster_id(ctx) == first
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_cluster_that_was_starting_when_its_worker_was_killed_is_found_and_waited_for(
    by_name: Callable[[], Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start_up() -> None:
        eventually(lambda: looks_at_the_cluster(emulator))
        assert cluster_statuses(emulator) == ["Starting"]
        emulator.advance_clock(STARTUP)

    monkeypatch.setattr(clusters, "STARTING_PAUSE_SECONDS", 0.1)
    start_slowly(emulator)
    with ThreadPoolExecutor() as background:
        started = background.submit(start_up)
        with start_try(2), use_cluster(CLUSTER):
            assert cluster_statuses(emulator) == ["Idle"]
        started.result()
    assert cluster_statuses(emulator) == ["Stopped"]


def test_a_cluster_that_stops_while_it_is_waited_for_is_an_error(
    by_name: Callable[[], Any],
    emulator: RunningEmulator,
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop() -> None:
        eventually(lambda: looks_at_the_cluster(emulator) > 3)  # the try has found it, and waits
        by_name().stop()

    monkeypatch.setattr(clusters, "STARTING_PAUSE_SECONDS", 0.1)
    start_slowly(emulator)
    with ThreadPoolExecutor() as background:
        stopped = background.submit(stop)
        with start_try(2, raises=RuntimeError, match="did not start: STOP"):
            use_cluster(CLUSTER).__enter__()
        stopped.result()


def test_the_next_try_starts_a_cluster_when_that_of_the_first_has_stopped(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    for try_number in (1, 2):
        with start_try(try_number), use_cluster(CLUSTER) as ctx:
            run_query(ONE_ROW.remote(ctx).execute)
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]


# Several users


@pytest.mark.usefixtures("pc")
@pytest.mark.parametrize("last", ["short", "long"])
def test_the_last_user_out_stops_the_cluster(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    last: str,
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER):
            yield

    users = {task_id: freeze(body, task_id=task_id) for task_id in ("short", "long")}
    [first_out] = users.keys() - {last}
    assert cluster_statuses(emulator) == ["Idle"]
    users[first_out].wake(KeyError())
    assert cluster_statuses(emulator) == ["Idle"]
    assert "is left running for its other users" in caplog.text
    users[last].wake(KeyError())
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc")
def test_two_users_who_leave_at_the_same_time_stop_the_cluster(
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owners = [Owner("shop", "manual__1", task_id, -1) for task_id in ("short", "long")]
    for owner in owners:
        supervisor.states["manual__1"][owner.task_id] = "running"
        ledger.put(ledger.cluster_key("shop", owner), owner, {"manifest": "shop"})
    compute_context(CLUSTER).start()
    # Both look before one of them is off the record.
    both_have_looked = Barrier(2)
    erase = ledger.erase

    def erase_together(key: str) -> None:
        both_have_looked.wait(60)
        erase(key)

    monkeypatch.setattr(ledger, "erase", erase_together)
    with ThreadPoolExecutor() as workers:
        for released in [workers.submit(releases.release, "shop", owner) for owner in owners]:
            released.result()
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("state", ["success", "failed", "skipped", "upstream_failed", "removed"])
def test_a_user_whose_task_has_ended_does_not_keep_the_cluster(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    state: str,
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER):
            yield

    kill(body, task_id="killed")
    supervisor.states["manual__1"]["killed"] = state
    with start_try(), use_cluster(CLUSTER):
        pass
    assert cluster_statuses(emulator) == ["Stopped"]
    assert entries(supervisor, "cluster") == []


@pytest.mark.parametrize("state", ["running", "queued", "up_for_retry", "restarting", None])
def test_a_user_whose_next_try_is_to_come_keeps_the_cluster(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    state: str | None,
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER):
            yield

    kill(body, task_id="killed")
    supervisor.states["manual__1"]["killed"] = state
    with start_try(), use_cluster(CLUSTER):
        pass
    assert cluster_statuses(emulator) == ["Idle"]


def test_mapped_tasks_are_users_of_their_own(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER):
            yield

    kill(body, map_index=0)
    with start_try(map_index=1), use_cluster(CLUSTER):
        pass
    assert cluster_statuses(emulator) == ["Idle"]


# compute_context


@pytest.mark.usefixtures("ti", "pc")
def test_a_contexts_cluster_is_running_and_nobody_stops_it(emulator: RunningEmulator) -> None:
    for _ in range(2):
        ctx = compute_context(CLUSTER)
        assert cluster_statuses(emulator) == ["Idle"]
        run_query(ONE_ROW.remote(ctx).execute)
    assert cluster_statuses(emulator) == ["Idle"]


@pytest.mark.parametrize("fault", OUTAGES.values(), ids=OUTAGES)
@pytest.mark.parametrize("operation", ["GET workspace", "GET manifest/find", "POST manifest"])
def test_making_a_context_survives_an_outage(
    pc: ModuleType, emulator: RunningEmulator, operation: str, fault: dict[str, Any]
) -> None:
    emulator.add_fault(operation, **fault)
    compute_context(CLUSTER)
    assert emulator.state()["manifests"] == ["shop"]
    assert emulator.state()["faults"] == []


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize(
    "drift",
    [
        {"polars_version": "1.41.2"},
        {"python_version": {"major": 3, "minor": 9, "patch": 1}},
    ],
    ids=["polars", "python"],
)
@pytest.mark.parametrize("use", [use_cluster, compute_context])
def test_a_task_that_is_run_alone_after_an_upgrade_registers_the_manifest_anew(
    emulator: RunningEmulator, use: Any, drift: dict[str, Any]
) -> None:
    manifest = {**MANIFEST_BODY, **drift, "name": "shop"}
    emulator.call("POST", "manifest", manifest)
    if use is use_cluster:
        with use_cluster(CLUSTER) as ctx:
            run_query(ONE_ROW.remote(ctx).execute)
    else:
        run_query(ONE_ROW.remote(compute_context(CLUSTER)).execute)
    assert query_statuses(emulator) == ["Success"]


# start_cluster


def test_start_registers_the_manifest_and_starts_its_cluster(
    run: Run, emulator: RunningEmulator
) -> None:
    run.start_cluster({**CLUSTER, "cluster_size": 2})
    [cluster] = emulator.state()["clusters"]
    assert (cluster["manifest"], cluster["status"]) == ("shop", "Idle")
    assert cluster["cluster_size"] == 2


def test_start_can_be_repeated(run: Run, emulator: RunningEmulator) -> None:
    for _ in range(2):
        run.start_cluster()
    assert cluster_statuses(emulator) == ["Idle"]


def test_a_start_whose_reply_is_lost_starts_no_second_cluster(
    run: Run, emulator: RunningEmulator
) -> None:
    emulator.add_fault("POST manifest/start", "answer_lost")
    run.start_cluster()
    assert cluster_statuses(emulator) == ["Idle"]


def test_a_spec_that_is_refused_starts_nothing(
    run: Run, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    with pytest.raises(ValueError, match="idle_timeout_mins must be at least 10"):
        run.start_cluster({**CLUSTER, "idle_timeout_mins": 5})
    assert cluster_statuses(emulator) == []
    assert supervisor.variables == {}


def test_a_start_that_fails_leaves_no_cluster_behind(
    run: Run, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    emulator.add_fault("POST manifest/start", "answer_lost")
    emulator.add_fault("POST manifest/start", "http_error", status=403, message="for good")
    with pytest.raises(ValueError, match="for good"):
        run.start_cluster()
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_start_that_fails_says_why_although_there_is_nothing_to_stop(
    run: Run, emulator: RunningEmulator
) -> None:
    emulator.add_fault("POST manifest/start", "startup_fails", message="no machines left")
    with pytest.raises(RuntimeError, match="no machines left"):
        run.start_cluster()
    assert cluster_statuses(emulator) == ["Failed"]


def test_a_start_that_fails_leaves_the_cluster_to_its_other_users(
    run: Run, other_run: Run, emulator: RunningEmulator
) -> None:
    run.start_cluster()
    emulator.add_fault("GET manifest/find", "http_error", status=403, message="for good")
    with pytest.raises(ValueError, match="for good"):
        other_run.start_cluster()
    assert cluster_statuses(emulator) == ["Idle"]


def test_start_gives_an_idle_cluster_that_nobody_uses_the_changed_specification(
    run: Run, by_name: Callable[[], Any], emulator: RunningEmulator
) -> None:
    by_name().start()
    run.start_cluster({**CLUSTER, "cluster_size": 2})
    sizes = [(each["cluster_size"], each["status"]) for each in emulator.state()["clusters"]]
    assert sizes == [(1, "Stopped"), (2, "Idle")]


def test_start_leaves_the_cluster_of_another_run_as_it_is(
    run: Run, other_run: Run, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    other_run.start_cluster()
    run.start_cluster({**CLUSTER, "cluster_size": 2})
    assert cluster_statuses(emulator) == ["Idle"]
    assert "it is changed at the next start: cluster_size 1 → 2" in caplog.text


def test_a_start_is_on_record_before_it_begins(
    run: Run, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    emulator.add_fault("POST manifest/start", "delay", seconds=60)
    with ThreadPoolExecutor() as background:
        starting = background.submit(run.start_cluster)
        eventually(lambda: calls(emulator, "start"))
        on_record = entries(supervisor, "cluster")
        emulator.clear_faults()  # which ends the delay
        starting.result()
    assert [entry["manifest"] for entry in on_record] == ["shop"]


# stop_cluster


def test_stop_stops_the_cluster_of_its_manifest_and_no_other(
    run: Run, emulator: RunningEmulator
) -> None:
    run.start_cluster(CLUSTER)
    run.start_cluster(OTHER_CLUSTER)
    run.stop_cluster(CLUSTER)
    states = {each["manifest"]: each["status"] for each in emulator.state()["clusters"]}
    assert states == {"shop": "Stopped", "warehouse": "Idle"}


def test_a_shared_cluster_is_not_stopped_by_the_tasks_that_use_it(
    run: Run, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    run.start_cluster()
    run.query()
    assert cluster_statuses(emulator) == ["Idle"]
    run.stop_cluster()
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_stop_is_quiet_when_nothing_is_running(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.start_cluster()
    for _ in range(2):
        run.stop_cluster()
    assert "is not running: nothing to stop" in caplog.text


def test_stop_is_quiet_when_there_is_no_such_manifest(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.stop_cluster()
    assert "Manifest shop does not exist: nothing to stop" in caplog.text


@pytest.mark.usefixtures("short_outages")
@pytest.mark.parametrize(
    "operation", ["GET manifest/find", "GET compute/{id}", "POST compute/{id}/stop"]
)
@pytest.mark.parametrize("status", [403, 503])
def test_stop_is_not_quiet_when_it_fails(
    run: Run, emulator: RunningEmulator, operation: str, status: int
) -> None:
    run.start_cluster()
    emulator.add_fault(operation, "http_error", status=status, times=1_000)
    with pytest.raises(ValueError, match=f"Status {status}"):
        run.stop_cluster()
    assert cluster_statuses(emulator) == ["Idle"]


def test_stop_cancels_what_the_runs_tasks_have_left_running(
    run: Run, emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    run.start_cluster()
    run.kill_mid_query(emulator)
    run.stop_cluster()
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("short_wind_up")
def test_stop_cancels_nothing_on_another_cluster(
    run: Run, start_try: StartTry, emulator: RunningEmulator
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(OTHER_CLUSTER) as ctx:
            yield submit_hanging_query(emulator, ctx)

    run.start_cluster()
    kill(body)
    run.states["run_query"] = "failed"
    run.stop_cluster()
    states = {each["manifest"]: each["status"] for each in emulator.state()["clusters"]}
    assert states == {"shop": "Stopped", "warehouse": "Running"}
    assert query_statuses(emulator) == ["InProgress"]


@pytest.mark.usefixtures("short_wind_up")
def test_stop_leaves_a_query_alone_that_a_task_of_the_run_has_left_to_itself(
    run: Run, start_try: StartTry, emulator: RunningEmulator
) -> None:
    run.start_cluster()
    with start_try():
        leave(submit_hanging_query(emulator, compute_context(CLUSTER)))
    run.stop_cluster()
    assert query_statuses(emulator) == ["InProgress"]
    assert cluster_statuses(emulator) == ["Running"]


def test_stop_makes_few_calls_however_many_queries_have_ended(
    run: Run, start_try: StartTry, emulator: RunningEmulator
) -> None:
    run.start_cluster()
    for task_id in ("first", "second", "third"):
        with start_try(task_id=task_id), use_cluster(CLUSTER) as ctx:
            queries = [submit(ONE_ROW.remote(ctx).single_node().execute) for _ in range(5)]
            for query in queries:
                wait_for(query)
    before = len(emulator.journal())
    run.stop_cluster()
    assert query_statuses(emulator) == ["Success"] * 15
    assert cluster_statuses(emulator) == ["Stopped"]
    assert len(emulator.journal()) - before <= 10


def test_stop_is_not_held_up_by_a_query_that_polars_cloud_has_forgotten(
    run: Run, emulator: RunningEmulator
) -> None:
    run.start_cluster()
    run.kill_mid_query(emulator)
    emulator.reset()
    run.start_cluster()
    run.stop_cluster()
    assert cluster_statuses(emulator) == ["Stopped"]


def test_stop_leaves_a_cluster_that_is_idle_between_two_tasks_of_another_run(
    run: Run, other_run: Run, emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    for each in (run, other_run):
        each.start_cluster()
        each.query()
    run.stop_cluster()
    assert cluster_statuses(emulator) == ["Idle"]
    assert "is left running for its other users" in caplog.text
    other_run.stop_cluster()
    assert cluster_statuses(emulator) == ["Stopped"]


def test_stop_leaves_a_query_of_another_run_running(
    run: Run, other_run: Run, emulator: RunningEmulator
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER) as ctx:
            yield submit_hanging_query(emulator, ctx)

    run.start_cluster()
    kill(body, run_id=other_run.run_id)
    run.stop_cluster()
    assert query_statuses(emulator) == ["InProgress"]
    assert cluster_statuses(emulator) == ["Running"]


def test_stop_leaves_a_cluster_that_another_run_is_starting(
    run: Run, by_name: Callable[[], Any], emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    other = Owner("shop", "manual__2", "start_cluster", -1, whole_run=True)
    supervisor.states["manual__2"]["start_cluster"] = "running"
    ledger.put(ledger.cluster_key("shop", other), other, {"manifest": "shop"})
    start_slowly(emulator)
    run.stop_cluster()
    assert cluster_statuses(emulator) == ["Starting"]


def test_stop_does_not_wait_for_a_run_that_has_ended_without_its_teardown(
    run: Run, other_run: Run, emulator: RunningEmulator
) -> None:
    for each in (run, other_run):
        each.start_cluster()
    other_run.states |= {"run_query": "failed", "stop_cluster": "skipped"}
    run.stop_cluster()
    assert cluster_statuses(emulator) == ["Stopped"]


# shared_cluster


@task
def query_once() -> None: ...


@task
def query_region(region: str) -> None: ...


def test_a_shared_cluster_encloses_the_tasks_made_inside_mapped_ones_included() -> None:
    with DAG("shop", schedule=None) as dag:
        outside = query_once.override(task_id="outside")()
        with shared_cluster(CLUSTER):
            query_once() >> query_region.expand(region=["North", "South"])
    start, stop = dag.get_task("start_cluster"), dag.get_task("stop_cluster")
    assert start.is_setup
    assert stop.is_teardown
    assert "query_once" in start.downstream_task_ids
    assert {"query_region", "start_cluster"} <= stop.upstream_task_ids
    assert outside.operator.downstream_task_ids == set()


def test_two_shared_clusters_in_one_dag_are_told_apart() -> None:
    with DAG("shop", schedule=None) as dag:
        for cluster in (CLUSTER, OTHER_CLUSTER):
            with shared_cluster(cluster, conn_id="nightly"):
                query_once.override(task_id=f"query_{cluster['name']}")()
    arguments = {task_id: dag.get_task(task_id).op_args for task_id in dag.task_ids}
    assert arguments["stop_cluster"] == ("shop", "start_cluster", "nightly")
    assert arguments["stop_cluster__1"] == ("warehouse", "start_cluster__1", "nightly")
    assert arguments["start_cluster__1"] == (OTHER_CLUSTER, "nightly")
    assert dag.get_task("query_warehouse").upstream_task_ids == {"start_cluster__1"}
