"""`clusters.py`: each cluster stops after its last user, and not before."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from threading import Barrier, Event
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk import DAG, get_current_context, task

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import clusters, detach, ensure_manifest, shared_cluster, use_cluster
from polars_remote.cloud.client import get_cluster_id
from polars_remote.cloud.session import CloudSession
from polars_remote.clusters import start_for_run, stop_for_run
from polars_remote.compat.versions import AirflowFailException
from polars_remote.errors import (
    ClusterNotStartedError,
    ClusterRefusedError,
    QueryNotAwaitedError,
)
from polars_remote.ownership import end, record
from polars_remote.ownership.end import EndFailure, end_orphans, end_use
from polars_remote.ownership.record import ClusterUse, Owner
from polars_remote.waiting import deferral
from tests.manifest_body import MANIFEST_BODY
from tests.observed import calls, cluster_statuses, entries, query_statuses
from tests.tries import StartTry, Supervisor, freeze, kill, start_try

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

USES: dict[str, Callable[[Any], Any]] = {
    "use_cluster": lambda cluster: use_cluster(cluster).__enter__(),
    "shared_cluster": lambda cluster: shared_cluster(cluster).__enter__(),
    "ensure_manifest": ensure_manifest,
}


@pytest.fixture
def short_wind_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only briefly for a cluster to become idle."""
    monkeypatch.setattr(end, "IDLE_WAIT_SECONDS", 0.1)


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only briefly for a query that the task has not returned."""
    monkeypatch.setattr(deferral, "IN_WORKER_SECONDS", 0.1)


@pytest.fixture
def by_name(pc: ModuleType) -> Callable[[], Any]:
    """Return a context for the cluster by its name, made without the library."""
    pc.ComputeContext(workspace="playground", cpus=2, memory=4).register("shop")
    return lambda: pc.ComputeContext(workspace="playground", name="shop")


class Run:
    """A run with a shared cluster: a setup, a task and a teardown."""

    def __init__(self, supervisor: Supervisor, start_try: StartTry, run_id: str) -> None:
        self.run_id = run_id
        self._start_try = start_try
        self.states = supervisor.states[run_id]
        self.states |= {"run_query": None, "stop_cluster": None}

    def start_cluster(self, cluster: dict[str, Any] = CLUSTER) -> None:
        with self._start_try(task_id="start_cluster", run_id=self.run_id, scope=False):
            start_for_run(cluster, "polars_cloud")

    def stop_cluster(self, cluster: dict[str, Any] = CLUSTER) -> None:
        with self._start_try(task_id="stop_cluster", run_id=self.run_id, scope=False):
            stop_for_run(cluster, "polars_cloud", "start_cluster")

    def query(self) -> None:
        with self._start_try(run_id=self.run_id), use_cluster(CLUSTER) as ctx:
            query(ctx)

    def kill_mid_query(self, emulator: RunningEmulator) -> None:
        """Run the task's only try, and kill it while its query runs."""

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


def query(ctx: Any) -> None:
    """Run a short query."""
    ONE_ROW.remote(ctx).single_node().execute()


def submit_hanging_query(emulator: RunningEmulator, ctx: Any, uri: str = FILE) -> Any:
    emulator.add_fault("SubmitQuery", "query_hangs")
    return ONE_ROW.remote(ctx).single_node().sink_parquet(uri)


def refuse_stops(emulator: RunningEmulator) -> None:
    emulator.add_fault(
        "POST compute/{id}/stop", "http_error", status=403, message="for good", times=1_000
    )


def states_by_manifest(emulator: RunningEmulator) -> dict[str, str]:
    return {each["manifest"]: each["status"] for each in emulator.state()["clusters"]}


def come(supervisor: Supervisor, task_id: str, **options: Any) -> ClusterUse:
    """Start a task on another worker that uses the cluster."""
    supervisor.states["manual__1"][task_id] = "running"
    owner = Owner("shop", "manual__1", task_id, -1)
    use = ClusterUse(owner, "polars_cloud", "shop", **options)
    record.put(use.key, use)
    return use


def use_from_elsewhere(emulator: RunningEmulator, ctx: Any) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    ONE_ROW.remote(ctx).execute(blocking=False)


def looks_at_the_cluster(emulator: RunningEmulator) -> int:
    return calls(emulator, f"compute/{emulator.state()['clusters'][0]['id']}")


def use_for_a_query() -> Iterator[None]:
    """Body of a try whose worker freezes after its query has ended."""
    with use_cluster(CLUSTER) as ctx:
        query(ctx)
        yield


def run_for_a_minute(emulator: RunningEmulator, ctx: Any) -> None:
    """Run another user's query for a minute on the emulator's clock."""
    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    ctx.start()
    ONE_ROW.remote(ctx).execute(blocking=False)
    eventually(lambda: query_statuses(emulator) == ["InProgress"])


def wait_for_a_look(emulator: RunningEmulator) -> None:
    asked = looks_at_the_cluster(emulator)
    eventually(lambda: looks_at_the_cluster(emulator) > asked)


def end_while_the_cluster_is_looked_at(
    emulator: RunningEmulator, background: ThreadPoolExecutor, use: ClusterUse
) -> Future[list[EndFailure]]:
    """End the use; delay its status call for the cluster until the faults are cleared.

    It has read the record of other users once before.
    """
    asked = looks_at_the_cluster(emulator)
    emulator.add_fault("GET compute/{id}", "delay", seconds=60)
    ended = background.submit(lambda: end_use(CloudSession("polars_cloud"), use).left)
    eventually(lambda: looks_at_the_cluster(emulator) > asked)
    return ended


def start_slowly(emulator: RunningEmulator) -> None:
    """Leave the manifest's cluster in status Starting, as a killed worker does."""
    emulator.add_fault("POST manifest/start", "startup_takes", seconds=STARTUP.total_seconds())
    versions = {key: MANIFEST_BODY[key] for key in ("python_version", "polars_version")}
    start = {"name": "shop", **versions}
    emulator.call("POST", "manifest/start", start)
    assert cluster_statuses(emulator) == ["Starting"]


# use_cluster


@pytest.mark.usefixtures("ti", "pc")
def test_the_first_query_starts_the_cluster_and_the_end_of_the_block_stops_it(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    with use_cluster(CLUSTER) as ctx:
        assert cluster_statuses(emulator) == []
        query(ctx)
        assert cluster_statuses(emulator) == ["Idle"]
        ONE_ROW.remote().execute()  # on the block's context
    assert cluster_statuses(emulator) == ["Stopped"]
    assert entries(supervisor, "cluster") == []


@pytest.mark.usefixtures("ti", "pc")
def test_a_block_without_a_query_starts_no_cluster(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    with use_cluster(CLUSTER) as ctx:
        ctx.start()  # the first query does
    assert cluster_statuses(emulator) == []
    assert entries(supervisor, "cluster") == []


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_runs_already_is_used(
    by_name: Callable[[], Any], emulator: RunningEmulator
) -> None:
    by_name().start()
    with use_cluster(CLUSTER) as ctx:
        query(ctx)
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti", "short_wind_up")
@pytest.mark.parametrize("error", [None, ValueError("mine")])
def test_a_cluster_on_which_somebody_elses_query_runs_is_left_running(
    by_name: Callable[[], Any],
    emulator: RunningEmulator,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
) -> None:
    def use() -> None:
        with use_cluster(CLUSTER) as ctx:
            query(ctx)
            use_from_elsewhere(emulator, by_name())
            if error:
                raise error

    if error:
        with pytest.raises(ValueError, match="mine"):
            use()
    else:
        use()
    assert cluster_statuses(emulator) == ["Running"]
    assert "keeps running: it runs a query of another user" in caplog.text


@pytest.mark.usefixtures("ti")
def test_a_cluster_whose_last_query_is_just_ending_is_stopped(
    by_name: Callable[[], Any], emulator: RunningEmulator
) -> None:
    def end_query() -> None:
        wait_for_a_look(emulator)
        emulator.advance_clock(timedelta(minutes=1))

    with ThreadPoolExecutor() as background, use_cluster(CLUSTER):
        run_for_a_minute(emulator, by_name())
        ended = background.submit(end_query)
    ended.result()
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(143)])
def test_the_bodys_own_error_is_what_the_task_sees(
    emulator: RunningEmulator, error: BaseException
) -> None:
    def use() -> None:
        with use_cluster(CLUSTER) as ctx:
            query(ctx)
            raise error

    with pytest.raises(type(error)) as raised:
        use()
    assert raised.value is error
    assert cluster_statuses(emulator) == ["Stopped"]


def test_the_bodys_own_error_survives_a_stop_that_is_refused(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuse_stops(emulator)
    with start_try(raises=ValueError, match="mine"), use_cluster(CLUSTER) as ctx:
        query(ctx)
        raise ValueError("mine")
    assert "The next try, clean_up or the orphan sweep will try again" in caplog.text
    assert "for good" in caplog.text
    assert len(entries(supervisor, "cluster")) == 1


def test_a_stop_that_is_refused_after_a_good_body_is_a_warning_and_left_to_the_sweep(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuse_stops(emulator)
    with start_try(), use_cluster(CLUSTER) as ctx:
        query(ctx)
    assert supervisor.states["manual__1"]["run_query"] == "success"
    [warning] = [each for each in caplog.records if each.levelname == "WARNING"]
    assert "Could not end the use of the cluster of manifest shop" in warning.getMessage()
    assert "for good" in warning.getMessage()
    assert cluster_statuses(emulator) == ["Idle"]
    assert [entry["manifest"] for entry in entries(supervisor, "cluster")] == ["shop"]
    assert len(entries(supervisor, "task")) == 1

    asked = calls(emulator, "stop")
    [left] = end_orphans()
    assert "for good" in left.reason
    assert calls(emulator, "stop") == asked + 1
    assert len(entries(supervisor, "cluster")) == 1
    emulator.clear_faults()
    assert end_orphans() == []
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_stop_that_was_refused_is_not_tried_again_at_the_end_of_the_task(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    refuse_stops(emulator)
    with start_try(), use_cluster(CLUSTER) as ctx:
        query(ctx)
    assert calls(emulator, "stop") == 1


def test_the_next_block_of_the_task_stops_the_cluster_whose_stop_was_refused(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    refuse_stops(emulator)
    with start_try():
        with use_cluster(CLUSTER) as ctx:
            query(ctx)
        emulator.clear_faults()
        with use_cluster(CLUSTER) as ctx:
            query(ctx)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_has_stopped_by_the_end_is_no_error(
    by_name: Callable[[], Any], emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    with use_cluster(CLUSTER) as ctx:
        query(ctx)
        by_name().stop()
    assert cluster_statuses(emulator) == ["Stopped"]
    assert "nothing to stop" in caplog.text


@pytest.mark.usefixtures("ti")
def test_the_last_user_stops_the_cluster_that_another_one_has_started_in_place_of_its_own(
    by_name: Callable[[], Any], emulator: RunningEmulator
) -> None:
    with use_cluster(CLUSTER) as ctx:
        query(ctx)
        by_name().stop()
        by_name().start()
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]


@pytest.mark.usefixtures("by_name")
def test_a_cluster_that_is_still_starting_is_stopped_by_its_last_user(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    start_slowly(emulator)
    with start_try(), use_cluster(CLUSTER):
        pass
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti", "pc")
def test_a_cluster_that_does_not_start_says_why(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    emulator.add_fault("POST manifest/start", "startup_fails", message="no machines left")
    with (
        pytest.raises(ClusterNotStartedError, match="no machines left"),
        use_cluster(CLUSTER) as ctx,
    ):
        query(ctx)
    assert cluster_statuses(emulator) == ["Failed"]
    assert entries(supervisor, "cluster") == []


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("cluster", [{"cpus": 2, "memory": 4}, {"name": "", "cpus": 2}, "shop"])
def test_a_cluster_without_a_name_is_refused_and_not_retried(
    emulator: RunningEmulator, supervisor: Supervisor, use: Callable[[Any], Any], cluster: Any
) -> None:
    with pytest.raises(ClusterRefusedError, match="A cluster needs a name") as refused:
        use(cluster)
    assert isinstance(refused.value, AirflowFailException)
    assert emulator.state()["manifests"] == []
    assert supervisor.variables == {}


@pytest.mark.usefixtures("ti", "short_wait")
def test_a_query_that_nobody_has_waited_for_is_an_error_at_the_end_of_the_block(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    with (
        pytest.raises(QueryNotAwaitedError, match="has not waited"),
        use_cluster(CLUSTER) as ctx,
    ):
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
        "POST manifest",
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
        query(ctx)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert emulator.state()["faults"] == []


# stop=False


def test_a_cluster_that_is_used_without_a_stop_is_left_to_its_idle_timeout(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    for _ in range(2):
        with start_try(), use_cluster(CLUSTER, stop=False) as ctx:
            query(ctx)
            [entry] = entries(supervisor, "cluster")
            assert entry["stops"] is False
    assert cluster_statuses(emulator) == ["Idle"]
    assert supervisor.variables == {}


def test_a_user_without_a_stop_keeps_the_cluster_running_under_its_query(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    with start_try(task_id="other"), use_cluster(CLUSTER, stop=False) as ctx:
        query(ctx)
        with start_try(), use_cluster(CLUSTER):
            pass
        assert cluster_statuses(emulator) == ["Idle"]
        query(ctx)
    assert cluster_statuses(emulator) == ["Idle"]
    assert supervisor.variables == {}


def test_the_last_user_stops_the_cluster_for_one_that_was_killed_and_wanted_a_stop(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    kill(use_for_a_query, task_id="killed")
    supervisor.states["manual__1"]["killed"] = "failed"
    with start_try(), use_cluster(CLUSTER, stop=False):
        pass
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_stop_for_a_user_that_was_killed_is_made_up_for_if_it_is_refused(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    kill(use_for_a_query, task_id="killed")
    supervisor.states["manual__1"]["killed"] = "failed"
    refuse_stops(emulator)
    with start_try(), use_cluster(CLUSTER, stop=False):
        pass
    emulator.clear_faults()
    assert end_orphans() == []
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_nobody_stops_a_cluster_whose_only_user_wanted_no_stop_and_was_killed(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER, stop=False) as ctx:
            query(ctx)
            yield

    kill(body)
    supervisor.states["manual__1"]["run_query"] = "failed"
    assert end_orphans() == []
    assert cluster_statuses(emulator) == ["Idle"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize(
    "drift",
    [
        {"polars_version": "1.41.2"},
        {"python_version": {"major": 3, "minor": 9, "patch": 1}},
    ],
    ids=["polars", "python"],
)
@pytest.mark.parametrize("stop", [True, False])
def test_a_task_that_is_run_alone_after_an_upgrade_registers_the_manifest_again(
    emulator: RunningEmulator, stop: bool, drift: dict[str, Any]
) -> None:
    emulator.call("POST", "manifest", {**MANIFEST_BODY, **drift, "name": "shop"})
    with use_cluster(CLUSTER, stop=stop) as ctx:
        query(ctx)
    assert query_statuses(emulator) == ["Success"]


# Several clusters, several blocks


@pytest.mark.usefixtures("ti", "pc")
def test_two_clusters_in_one_task_are_kept_apart(emulator: RunningEmulator) -> None:
    with use_cluster(CLUSTER) as first, use_cluster({**OTHER_CLUSTER, "cluster_size": 2}) as second:
        for ctx in (first, second):
            query(ctx)
        assert get_cluster_id(first) != get_cluster_id(second)
        sizes = {each["manifest"]: each["cluster_size"] for each in emulator.state()["clusters"]}
        assert sizes == {"shop": 1, "warehouse": 2}
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]


def test_the_next_try_of_a_killed_worker_gets_both_its_clusters_back(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    both = (CLUSTER, {**OTHER_CLUSTER, "cluster_size": 2})

    def body() -> Iterator[list[Any]]:
        with use_cluster(both[0]) as first, use_cluster(both[1]) as second:
            for ctx in (first, second):
                query(ctx)
            yield [get_cluster_id(first), get_cluster_id(second)]

    before = kill(body)
    with start_try(2), use_cluster(both[0]) as first, use_cluster(both[1]) as second:
        assert [get_cluster_id(first), get_cluster_id(second)] == before
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("ti", "pc")
def test_the_end_of_one_clusters_block_leaves_the_query_on_another_alone(
    emulator: RunningEmulator,
) -> None:
    def fail_beside() -> None:
        with use_cluster(CLUSTER) as ctx:
            submit_hanging_query(emulator, ctx, OTHER_FILE)
            raise KeyError("mine")

    with use_cluster(OTHER_CLUSTER) as ctx:
        waiting = submit_hanging_query(emulator, ctx)
        with pytest.raises(KeyError, match="mine"):
            fail_beside()
        assert query_statuses(emulator) == ["InProgress", "Canceled"]
        assert states_by_manifest(emulator) == {"shop": "Stopped", "warehouse": "Running"}
        waiting.cancel()  # its end need not be awaited before the cluster stops
        detach(waiting)


@pytest.mark.usefixtures("ti", "pc")
def test_blocks_of_one_cluster_inside_each_other_stop_it_once(emulator: RunningEmulator) -> None:
    with use_cluster(CLUSTER) as ctx:
        query(ctx)
        with use_cluster(CLUSTER) as inner:
            assert get_cluster_id(inner) == get_cluster_id(ctx)
            query(inner)
        assert cluster_statuses(emulator) == ["Idle"]
        query(ctx)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert calls(emulator, "stop") == 1


@pytest.mark.usefixtures("ti", "pc")
def test_the_outer_block_stops_the_cluster_that_only_the_inner_one_has_started(
    emulator: RunningEmulator,
) -> None:
    with use_cluster(CLUSTER):
        with use_cluster(CLUSTER) as inner:
            query(inner)
        assert cluster_statuses(emulator) == ["Idle"]
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti", "pc", "short_wait")
@pytest.mark.parametrize("error", [None, KeyError("mine")], ids=["ends", "fails"])
def test_the_end_of_an_inner_block_leaves_the_query_of_the_outer_one_alone(
    emulator: RunningEmulator, error: Exception | None
) -> None:
    def use_inside() -> None:
        with use_cluster(CLUSTER) as inner:
            emulator.add_fault("SubmitQuery", "query_fails", error="ComputeError: mine")
            with pytest.raises(pl.exceptions.ComputeError):
                ONE_ROW.remote(inner).single_node().sink_parquet(OTHER_FILE).await_result()
            if error:
                raise error

    with use_cluster({**CLUSTER, "cluster_size": 2}) as ctx:
        waiting = submit_hanging_query(emulator, ctx)
        with suppress(KeyError):
            use_inside()
        assert query_statuses(emulator)[0] == "InProgress"
        waiting.cancel()
        detach(waiting)


@pytest.mark.usefixtures("ti", "pc")
def test_blocks_of_one_cluster_after_each_other_start_it_twice(emulator: RunningEmulator) -> None:
    for _ in range(2):
        with use_cluster(CLUSTER) as ctx:
            query(ctx)
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]


@pytest.mark.usefixtures("pc")
def test_blocks_of_one_cluster_in_threads_share_it_and_the_last_one_stops_it(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    both_are_open, one_has_ended = Barrier(2), Event()

    def use(number: int) -> None:
        with use_cluster(CLUSTER) as ctx:
            both_are_open.wait(60)
            ONE_ROW.remote(ctx).single_node().sink_parquet(f"{FILE}{number}").await_result()
            if number:
                one_has_ended.wait(60)
                query(ctx)

    with start_try():
        with ThreadPoolExecutor() as threads:
            last, first = threads.submit(use, 1), threads.submit(use, 0)
            first.result()
            eventually(lambda: cluster_statuses(emulator) == ["Idle"])
            one_has_ended.set()
            last.result()
        assert cluster_statuses(emulator) == ["Stopped"]
        assert calls(emulator, "stop") == 1
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc", "short_wait")
def test_the_end_of_one_threads_block_leaves_the_query_of_another_threads_block_alone(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    submitted, others_end = Event(), Event()

    def wait() -> None:
        with use_cluster(CLUSTER) as ctx:
            waiting = submit_hanging_query(emulator, ctx)
            submitted.set()
            others_end.wait(60)
            assert query_statuses(emulator) == ["InProgress"]
            waiting.cancel()
            detach(waiting)

    def end_beside() -> None:
        with use_cluster(CLUSTER):
            pass

    def fail_beside() -> None:
        with use_cluster(CLUSTER):
            raise KeyError("mine")

    with start_try(), ThreadPoolExecutor() as threads:
        waited = threads.submit(wait)
        submitted.wait(60)
        threads.submit(end_beside).result()
        with pytest.raises(KeyError, match="mine"):
            threads.submit(fail_beside).result()
        others_end.set()
        waited.result()


@pytest.mark.usefixtures("pc")
def test_a_block_that_begins_while_another_threads_block_stops_the_cluster_is_on_record(
    emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def use() -> list[str]:
        with use_cluster(CLUSTER) as ctx:
            query(ctx)
            return [entry["manifest"] for entry in entries(supervisor, "cluster")]

    with start_try(), ThreadPoolExecutor() as threads:
        emulator.add_fault("POST compute/{id}/stop", "delay", seconds=60)
        first = threads.submit(use)
        eventually(lambda: calls(emulator, "stop"))
        second = threads.submit(use)
        emulator.clear_faults()  # which ends the delay
        assert (first.result(), second.result()) == (["shop"], ["shop"])
    assert cluster_statuses(emulator) == ["Stopped", "Stopped"]
    assert supervisor.variables == {}


# Tries


def test_a_killed_worker_hands_its_cluster_over_to_the_next_try(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[Any]:
        with use_cluster(CLUSTER) as ctx:
            query(ctx)
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

    monkeypatch.setattr(clusters, "START_POLL_SECONDS", 0.1)
    start_slowly(emulator)
    with ThreadPoolExecutor() as background:
        started = background.submit(start_up)
        with start_try(2), use_cluster(CLUSTER) as ctx:
            query(ctx)
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
        eventually(
            lambda: looks_at_the_cluster(emulator) > 3
        )  # the try has found the query, and waits
        by_name().stop()

    monkeypatch.setattr(clusters, "START_POLL_SECONDS", 0.1)
    start_slowly(emulator)
    with ThreadPoolExecutor() as background:
        stopped = background.submit(stop)
        with (
            start_try(2, raises=ClusterNotStartedError, match="did not start: STOP"),
            use_cluster(CLUSTER) as ctx,
        ):
            query(ctx)
        stopped.result()


def test_the_next_try_starts_a_cluster_when_that_of_the_first_has_stopped(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    for try_number in (1, 2):
        with start_try(try_number), use_cluster(CLUSTER) as ctx:
            query(ctx)
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
    users = {task_id: freeze(use_for_a_query, task_id=task_id) for task_id in ("short", "long")}
    [first_out] = users.keys() - {last}
    assert cluster_statuses(emulator) == ["Idle"]
    users[first_out].wake(KeyError())
    assert cluster_statuses(emulator) == ["Idle"]
    assert "keeps running for its other users" in caplog.text
    users[last].wake(KeyError())
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_two_users_who_leave_at_the_same_time_stop_the_cluster(
    by_name: Callable[[], Any],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uses = [come(supervisor, task_id) for task_id in ("short", "long")]
    by_name().start()
    # Both read the record before either of them is erased.
    both_have_looked = Barrier(2)
    erase = record.erase

    def erase_together(key: str) -> None:
        both_have_looked.wait(60)
        erase(key)

    monkeypatch.setattr(record, "erase", erase_together)
    with ThreadPoolExecutor() as workers:
        ends = [workers.submit(end_use, CloudSession("polars_cloud"), use) for use in uses]
        assert [ended.result().left for ended in ends] == [[], []]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


def test_a_stop_that_is_refused_after_two_have_left_at_the_same_time_stays_on_record(
    by_name: Callable[[], Any],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use, other = (come(supervisor, task_id) for task_id in ("short", "long"))
    by_name().start()
    erase = record.erase

    def erase_after_the_other(key: str) -> None:
        erase(other.key)
        erase(key)

    refuse_stops(emulator)
    with monkeypatch.context() as patched:
        patched.setattr(record, "erase", erase_after_the_other)
        [left] = end_use(CloudSession("polars_cloud"), use).left
    assert "for good" in left.reason
    assert [entry["owner"][2] for entry in entries(supervisor, "cluster")] == ["short"]
    emulator.clear_faults()
    supervisor.states["manual__1"]["short"] = "success"
    assert end_orphans() == []
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti")
def test_a_user_who_comes_while_the_cluster_becomes_idle_keeps_it_running(
    by_name: Callable[[], Any],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def come_late() -> None:
        wait_for_a_look(emulator)
        come(supervisor, "late")
        emulator.advance_clock(timedelta(minutes=1))

    with ThreadPoolExecutor() as background, use_cluster(CLUSTER):
        run_for_a_minute(emulator, by_name())
        came = background.submit(come_late)
    came.result()
    assert cluster_statuses(emulator) == ["Idle"]
    assert [entry["owner"][2] for entry in entries(supervisor, "cluster")] == ["late"]
    assert "keeps running for its other users" in caplog.text


def test_a_user_who_comes_right_before_the_stop_keeps_the_cluster_running(
    by_name: Callable[[], Any], emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    by_name().start()
    use = come(supervisor, "early")
    with ThreadPoolExecutor() as background:
        ended = end_while_the_cluster_is_looked_at(emulator, background, use)
        late = come(supervisor, "late")
        emulator.clear_faults()  # which ends the delay
        assert ended.result() == []
    assert cluster_statuses(emulator) == ["Idle"]
    assert end_use(CloudSession("polars_cloud"), late).left == []
    assert cluster_statuses(emulator) == ["Stopped"]


def test_a_user_who_comes_right_before_the_stop_and_leaves_at_once_leaves_no_cluster_behind(
    by_name: Callable[[], Any],
    emulator: RunningEmulator,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_name().start()
    use = come(supervisor, "early")
    session = CloudSession("polars_cloud")
    erase = record.erase

    def erase_after_the_late_one(key: str) -> None:
        monkeypatch.setattr(record, "erase", erase)
        # Leaves the stop to the other user, who is still on record.
        assert end_use(session, late).left == []
        erase(key)

    with ThreadPoolExecutor() as background:
        ended = end_while_the_cluster_is_looked_at(emulator, background, use)
        late = come(supervisor, "late")
        monkeypatch.setattr(record, "erase", erase_after_the_late_one)
        emulator.clear_faults()  # which ends the delay
        assert ended.result() == []
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
    kill(use_for_a_query, task_id="killed")
    supervisor.states["manual__1"]["killed"] = state
    with start_try(), use_cluster(CLUSTER):
        pass
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("stop", [True, False])
def test_a_user_that_was_killed_mid_query_is_ended_by_the_next_user_of_the_cluster(
    run: Run, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor, stop: bool
) -> None:
    run.kill_mid_query(emulator)
    with start_try(task_id="next", run_id="manual__2"), use_cluster(CLUSTER, stop=stop) as ctx:
        assert query_statuses(emulator) == [
            "Canceled"
        ]  # the task's query would be queued behind it
        ONE_ROW.remote(ctx).single_node().execute()
    assert query_statuses(emulator) == ["Canceled", "Success"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.usefixtures("short_wind_up")
def test_a_user_that_was_killed_stays_on_record_while_its_query_cannot_be_canceled(
    run: Run, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    run.kill_mid_query(emulator)
    fault = {"code": "PERMISSION_DENIED", "message": "for good", "times": 1_000}
    emulator.add_fault("GetQueryStatus", "grpc_error", **fault)
    with start_try(task_id="next", run_id="manual__2"), use_cluster(CLUSTER):
        pass
    assert [entry["owner"][2] for entry in entries(supervisor, "cluster")] == ["run_query"]
    emulator.clear_faults()
    assert end_orphans() == []
    assert query_statuses(emulator) == ["Canceled"]
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


@pytest.mark.parametrize("state", ["running", "queued", "up_for_retry", "restarting", None])
def test_a_user_whose_next_try_is_to_come_keeps_the_cluster(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_try: StartTry,
    supervisor: Supervisor,
    state: str | None,
) -> None:
    kill(use_for_a_query, task_id="killed")
    supervisor.states["manual__1"]["killed"] = state
    with start_try(), use_cluster(CLUSTER):
        pass
    assert cluster_statuses(emulator) == ["Idle"]


def test_mapped_tasks_are_users_of_their_own(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    kill(use_for_a_query, map_index=0)
    with start_try(map_index=1), use_cluster(CLUSTER):
        pass
    assert cluster_statuses(emulator) == ["Idle"]


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
    with pytest.raises(ClusterNotStartedError, match="no machines left"):
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
    assert "the next start applies: cluster_size 1 → 2" in caplog.text


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
    assert states_by_manifest(emulator) == {"shop": "Stopped", "warehouse": "Idle"}


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
def test_a_stop_that_fails_is_a_warning_and_left_to_the_sweep(
    run: Run,
    emulator: RunningEmulator,
    supervisor: Supervisor,
    caplog: pytest.LogCaptureFixture,
    operation: str,
    status: int,
) -> None:
    run.start_cluster()
    emulator.add_fault(operation, "http_error", status=status, times=1_000)
    run.stop_cluster()
    assert run.states["stop_cluster"] == "success"
    assert "Could not end the use of the cluster of manifest shop" in caplog.text
    assert f"Status {status}" in caplog.text
    assert cluster_statuses(emulator) == ["Idle"]
    assert [entry["manifest"] for entry in entries(supervisor, "cluster")] == ["shop"]
    emulator.clear_faults()
    run.states["run_query"] = "success"
    assert end_orphans() == []
    assert cluster_statuses(emulator) == ["Stopped"]
    assert supervisor.variables == {}


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
    assert states_by_manifest(emulator) == {"shop": "Stopped", "warehouse": "Running"}
    assert query_statuses(emulator) == ["InProgress"]


@pytest.mark.usefixtures("short_wind_up")
def test_stop_leaves_a_query_alone_that_a_task_of_the_run_has_detached(
    run: Run, start_try: StartTry, emulator: RunningEmulator
) -> None:
    run.start_cluster()
    with start_try(), use_cluster(CLUSTER) as ctx:
        detach(submit_hanging_query(emulator, ctx))
    run.stop_cluster()
    assert query_statuses(emulator) == ["InProgress"]
    assert cluster_statuses(emulator) == ["Running"]


def test_stop_makes_few_calls_however_many_queries_have_ended(
    run: Run, start_try: StartTry, emulator: RunningEmulator
) -> None:
    run.start_cluster()
    for task_id in ("first", "second", "third"):
        with start_try(task_id=task_id), use_cluster(CLUSTER) as ctx:
            query = ONE_ROW.remote(ctx).single_node()
            for each in [query.execute(blocking=False) for _ in range(5)]:
                each.await_result()
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
    assert "keeps running for its other users" in caplog.text
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
    use = ClusterUse(other, "polars_cloud", "shop")
    record.put(use.key, use)
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


@pytest.mark.usefixtures("pc")
def test_two_shared_clusters_in_one_dag_are_distinguished(
    emulator: RunningEmulator, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", os.environ["AIRFLOW_CONN_POLARS_CLOUD"])
    with DAG("shop", schedule=None) as dag:
        for cluster in (CLUSTER, OTHER_CLUSTER):
            with shared_cluster(cluster, conn_id="nightly"):
                query_once.override(task_id=f"query_{cluster['name']}")()
    assert dag.get_task("query_warehouse").upstream_task_ids == {"start_cluster__1"}
    supervisor.states["manual__1"]["query_shop"] = None
    for task_id in ("start_cluster", "start_cluster__1"):
        execute(dag, task_id)
    assert states_by_manifest(emulator) == {"shop": "Idle", "warehouse": "Idle"}
    assert {entry["conn_id"] for entry in entries(supervisor, "cluster")} == {"nightly"}
    execute(dag, "stop_cluster__1")
    assert states_by_manifest(emulator) == {"shop": "Idle", "warehouse": "Stopped"}
    execute(dag, "stop_cluster")
    assert states_by_manifest(emulator) == {"shop": "Stopped", "warehouse": "Stopped"}
    assert supervisor.variables == {}


@pytest.mark.usefixtures("pc")
def test_a_check_that_fails_starts_no_shared_cluster(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    def refuse() -> None:
        raise AirflowFailException("no such bucket")

    with DAG("shop", schedule=None) as dag, shared_cluster(CLUSTER, check=refuse):
        query_once()
    with pytest.raises(AirflowFailException, match="no such bucket"):
        execute(dag, "start_cluster")
    assert cluster_statuses(emulator) == []
    assert supervisor.variables == {}


def execute(dag: DAG, task_id: str) -> None:
    """Run a try of a task of the DAG."""
    operator: Any = dag.get_task(task_id)
    with start_try(task=operator, scope=False):
        operator.execute(get_current_context())


def test_an_option_that_does_not_exist_is_refused_while_the_dag_file_is_parsed() -> None:
    misspelled = {"name": "shop", "cpus": 2, "memmory": 4}
    with (
        DAG("shop", schedule=None),
        pytest.raises(
            ClusterRefusedError, match=r"Unknown cluster option memmory: the options are .*memory"
        ),
        shared_cluster(misspelled),
    ):
        pass
