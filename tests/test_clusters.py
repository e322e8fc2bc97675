"""`include/clusters.py`: no cluster outlives its work, and none is stopped under somebody else."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import polars as pl
import pytest

from include import clusters
from include.clusters import clean_up, running_cluster
from include.manifests import ensure_manifest
from include.queries import submit
from polars_cloud_emulator.testing import RunningEmulator
from tests.emulator.blocking_query import BlockingQuery
from tests.tries import StartTry, Supervisor
from tests.waiting import eventually

SPEC = {"cpus": 2, "memory": 4}
FILE = "s3://your-bucket/results/one.parquet"

start_cluster = cast("Callable[..., str]", clusters.start_cluster.function)
stop_cluster = cast("Callable[[str], None]", clusters.stop_cluster.function)


@pytest.fixture
def short_wind_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is running is soon taken for one that others are using."""
    monkeypatch.setattr(clusters, "WIND_UP", 0.1)


@pytest.fixture
def by_spec(pc: ModuleType) -> Callable[[], Any]:
    return lambda: pc.ComputeContext(workspace="playground", **SPEC)


@pytest.fixture
def by_name(pc: ModuleType) -> Callable[[], Any]:
    ensure_manifest("shop", **SPEC)
    return lambda: pc.ComputeContext(workspace="playground", name="shop")


def statuses(emulator: RunningEmulator) -> list[str]:
    return [cluster["status"] for cluster in emulator.state()["clusters"]]


def query_statuses(emulator: RunningEmulator) -> list[str]:
    return [query["status"] for query in emulator.state()["queries"]]


def submit_hanging_query(emulator: RunningEmulator, ctx: Any) -> Any:
    emulator.add_fault("SubmitQuery", "query_hangs")
    return submit(pl.LazyFrame({"x": [1]}).remote(ctx).single_node(), FILE)


def use_from_elsewhere(emulator: RunningEmulator, ctx: Any) -> None:
    emulator.add_fault("SubmitQuery", "query_hangs")
    pl.LazyFrame({"x": [1]}).remote(ctx).execute(blocking=False)


def looks_at_the_cluster(emulator: RunningEmulator) -> int:
    cluster_id = emulator.state()["clusters"][0]["id"]
    return sum(call["path"].endswith(f"/compute/{cluster_id}") for call in emulator.journal())


# running_cluster


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("kind", ["by_spec", "by_name"])
def test_a_cluster_runs_for_the_body_and_no_longer(
    emulator: RunningEmulator, request: pytest.FixtureRequest, kind: str
) -> None:
    with running_cluster(request.getfixturevalue(kind)()) as ctx:
        assert statuses(emulator) == ["Idle"]
        pl.LazyFrame({"x": [1]}).remote(ctx).execute()
    assert statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_runs_already_is_used_and_left_alone(
    by_name: Callable[[], Any], emulator: RunningEmulator
) -> None:
    by_name().start()
    with running_cluster(by_name()) as ctx:
        pl.LazyFrame({"x": [1]}).remote(ctx).execute()
    assert len(statuses(emulator)) == 1
    assert by_name().get_status().is_available()


@pytest.mark.usefixtures("ti", "short_wind_up")
def test_a_cluster_that_others_are_using_by_the_end_is_left_running(
    by_name: Callable[[], Any], emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "include.clusters"),
        running_cluster(by_name()) as ctx,
    ):
        use_from_elsewhere(emulator, by_name())
    assert statuses(emulator) == ["Running"]
    assert f"{ctx._compute_id} is left running: others are using it" in caplog.text


@pytest.mark.usefixtures("ti", "short_wind_up")
def test_a_cluster_that_others_are_using_is_left_running_after_an_error_too(
    by_name: Callable[[], Any], emulator: RunningEmulator
) -> None:
    def body() -> None:
        use_from_elsewhere(emulator, by_name())
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), running_cluster(by_name()):
        body()
    assert statuses(emulator) == ["Running"]


@pytest.mark.usefixtures("ti")
def test_a_cluster_whose_last_query_is_just_ending_is_stopped(
    by_name: Callable[[], Any], emulator: RunningEmulator, tmp_path: Path
) -> None:
    blocking = BlockingQuery(tmp_path)

    def release() -> None:
        asked = looks_at_the_cluster(emulator)
        eventually(lambda: looks_at_the_cluster(emulator) > asked)
        blocking.release()

    with ThreadPoolExecutor() as background, running_cluster(by_name()) as ctx:
        blocking.lazy_frame().remote(ctx).execute(blocking=False)
        blocking.wait_for_start()
        released = background.submit(release)
    released.result()
    assert statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(143)])
def test_the_bodys_own_error_is_what_the_task_sees(
    by_spec: Callable[[], Any], emulator: RunningEmulator, error: BaseException
) -> None:
    with pytest.raises(type(error)) as raised, running_cluster(by_spec()):
        raise error
    assert raised.value is error
    assert statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti")
def test_the_bodys_own_error_survives_a_stop_that_fails(
    by_spec: Callable[[], Any], emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    def body() -> None:
        emulator.add_fault("POST compute/{id}/stop", "http_error", status=403, message="for good")
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), running_cluster(by_spec()):
        body()
    assert "The cluster could not be stopped" in caplog.text
    assert "for good" in caplog.text


@pytest.mark.usefixtures("ti")
def test_a_stop_that_fails_after_a_good_body_is_an_error(
    by_spec: Callable[[], Any], emulator: RunningEmulator
) -> None:
    with pytest.raises(ValueError, match="for good"), running_cluster(by_spec()):
        emulator.add_fault("POST compute/{id}/stop", "http_error", status=403, message="for good")


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_has_stopped_by_the_end_is_no_error(
    by_spec: Callable[[], Any],
    pc: ModuleType,
    emulator: RunningEmulator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.INFO, "include.clusters"),
        running_cluster(by_spec()) as ctx,
    ):
        pc.ComputeContext.connect(ctx._compute_id, workspace="playground").stop()
    assert statuses(emulator) == ["Stopped"]
    assert "nothing to stop" in caplog.text


@pytest.mark.usefixtures("ti")
def test_a_cluster_that_does_not_start_says_why(
    by_spec: Callable[[], Any], emulator: RunningEmulator
) -> None:
    emulator.add_fault("POST compute/start", "startup_fails", message="no machines left")
    with pytest.raises(RuntimeError, match="no machines left"), running_cluster(by_spec()):
        raise AssertionError("the body ran")
    assert statuses(emulator) == ["Failed"]


def test_a_try_that_died_hands_its_cluster_over_to_the_next(
    by_spec: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(1):
        died = running_cluster(by_spec())
        first = died.__enter__()
    with start_try(2), running_cluster(by_spec()) as second:
        pass
    assert statuses(emulator) == ["Stopped"]
    assert second._compute_id == first._compute_id


def test_a_next_try_starts_a_cluster_when_that_of_the_first_has_stopped(
    by_spec: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    for try_number in (1, 2):
        with start_try(try_number), running_cluster(by_spec()) as ctx:
            pl.LazyFrame({"x": [1]}).remote(ctx).execute()
    assert statuses(emulator) == ["Stopped", "Stopped"]


def test_a_task_that_is_killed_stops_its_cluster(
    by_spec: Callable[[], Any], emulator: RunningEmulator, ti: Any
) -> None:
    with pytest.raises(SystemExit), running_cluster(by_spec()):
        ti.task.on_kill()  # what Airflow's handler of SIGTERM does
    assert statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti")
def test_a_task_may_use_two_clusters_at_once(
    by_spec: Callable[[], Any], emulator: RunningEmulator
) -> None:
    with running_cluster(by_spec()) as first, running_cluster(by_spec()) as second:
        assert first._compute_id != second._compute_id
    assert statuses(emulator) == ["Stopped", "Stopped"]


# start_cluster


@pytest.mark.usefixtures("ti")
def test_start_registers_the_manifest_and_starts_its_cluster(emulator: RunningEmulator) -> None:
    assert start_cluster("shop", {**SPEC, "cluster_size": 2}) == "shop"
    [cluster] = emulator.state()["clusters"]
    assert (cluster["manifest"], cluster["status"]) == ("shop", "Idle")
    assert cluster["cluster_size"] == 2


@pytest.mark.usefixtures("ti")
def test_start_can_be_repeated(emulator: RunningEmulator) -> None:
    for _ in range(2):
        start_cluster("shop", SPEC)
    assert statuses(emulator) == ["Idle"]


@pytest.mark.usefixtures("ti")
def test_a_start_whose_answer_is_lost_starts_no_second_cluster(emulator: RunningEmulator) -> None:
    emulator.add_fault("POST manifest/start", "answer_lost")
    start_cluster("shop", SPEC)
    assert statuses(emulator) == ["Idle"]


@pytest.mark.usefixtures("ti")
def test_a_spec_that_is_refused_starts_nothing(emulator: RunningEmulator) -> None:
    with pytest.raises(ValueError, match="idle_timeout_mins must be at least 10"):
        start_cluster("shop", {**SPEC, "idle_timeout_mins": 5})
    assert statuses(emulator) == []


@pytest.mark.usefixtures("ti")
def test_a_start_that_fails_leaves_no_cluster_behind(emulator: RunningEmulator) -> None:
    emulator.add_fault("POST manifest/start", "answer_lost")
    emulator.add_fault("POST manifest/start", "http_error", status=403, message="for good")
    with pytest.raises(ValueError, match="for good"):
        start_cluster("shop", SPEC)
    assert statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti")
def test_a_start_that_fails_says_why_although_there_is_nothing_to_stop(
    emulator: RunningEmulator,
) -> None:
    emulator.add_fault("POST manifest/start", "startup_fails", message="no machines left")
    with pytest.raises(RuntimeError, match="no machines left"):
        start_cluster("shop", SPEC)
    assert statuses(emulator) == ["Failed"]


# stop_cluster


@pytest.mark.usefixtures("ti")
def test_stop_stops_the_cluster_of_its_manifest_and_no_other(emulator: RunningEmulator) -> None:
    for manifest in ("shop", "warehouse"):
        start_cluster(manifest, SPEC)
    stop_cluster("shop")
    states = {cluster["manifest"]: cluster["status"] for cluster in emulator.state()["clusters"]}
    assert states == {"shop": "Stopped", "warehouse": "Idle"}


@pytest.mark.usefixtures("ti")
def test_stop_is_quiet_when_nothing_is_running(caplog: pytest.LogCaptureFixture) -> None:
    start_cluster("shop", SPEC)
    stop_cluster("shop")
    with caplog.at_level(logging.INFO, "include.clusters"):
        stop_cluster("shop")
    assert "is not running: nothing to stop" in caplog.text


@pytest.mark.usefixtures("ti", "emulator")
def test_stop_is_quiet_when_there_is_no_such_manifest(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "include.clusters"):
        stop_cluster("shop")
    assert "Manifest shop does not exist: nothing to stop" in caplog.text


@pytest.mark.usefixtures("ti", "short_outages")
@pytest.mark.parametrize(
    "operation", ["GET manifest/find", "GET compute/{id}", "POST compute/{id}/stop"]
)
@pytest.mark.parametrize("status", [403, 503])
def test_stop_is_not_quiet_when_it_fails(
    emulator: RunningEmulator, operation: str, status: int
) -> None:
    start_cluster("shop", SPEC)
    emulator.add_fault(operation, "http_error", status=status, times=1_000)
    with pytest.raises(ValueError, match=f"Status {status}"):
        stop_cluster("shop")
    assert statuses(emulator) == ["Idle"]


def test_stop_cancels_what_the_runs_tasks_have_left_running(
    by_name: Callable[[], Any], emulator: RunningEmulator, ti: Any
) -> None:
    submit_hanging_query(emulator, by_name())
    stop_cluster("shop")
    assert query_statuses(emulator) == ["Canceled"]
    assert statuses(emulator) == ["Stopped"]


def test_stop_leaves_what_has_ended_alone(
    by_name: Callable[[], Any], emulator: RunningEmulator, ti: Any
) -> None:
    query = submit(pl.LazyFrame({"x": [1]}).remote(by_name()).single_node(), FILE)
    query.await_result()
    stop_cluster("shop")
    assert [query["cancels"] for query in emulator.state()["queries"]] == [0]
    assert statuses(emulator) == ["Stopped"]


def test_stop_is_not_held_up_by_a_query_that_polars_cloud_has_forgotten(
    by_name: Callable[[], Any], emulator: RunningEmulator, ti: Any
) -> None:
    submit_hanging_query(emulator, by_name())
    emulator.reset()
    start_cluster("shop", SPEC)
    stop_cluster("shop")
    assert statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("short_wind_up")
def test_stop_leaves_the_queries_of_other_runs_and_their_cluster_running(
    by_name: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(run_id="manual__1"):
        submit_hanging_query(emulator, by_name())
    with start_try(run_id="manual__2"):
        stop_cluster("shop")
    assert query_statuses(emulator) == ["InProgress"]
    assert statuses(emulator) == ["Running"]


# clean_up


def test_a_failed_runs_callback_stops_the_cluster_that_its_tasks_have_started(
    emulator: RunningEmulator, ti: Any
) -> None:
    start_cluster("shop", SPEC)
    clean_up(ti.get_template_context())
    assert statuses(emulator) == ["Stopped"]


def test_a_failed_runs_callback_cancels_what_its_tasks_have_left_running(
    by_name: Callable[[], Any], emulator: RunningEmulator, ti: Any
) -> None:
    submit_hanging_query(emulator, by_name())
    clean_up(ti.get_template_context())
    assert query_statuses(emulator) == ["Canceled"]


@pytest.mark.parametrize("state", [None, "queued", "running", "up_for_retry"])
def test_a_failed_runs_callback_leaves_everything_to_a_run_that_was_cleared(
    emulator: RunningEmulator,
    by_name: Callable[[], Any],
    supervisor: Supervisor,
    ti: Any,
    state: str | None,
) -> None:
    start_cluster("shop", SPEC)
    query = submit_hanging_query(emulator, by_name())
    supervisor.states |= {"start_cluster": "success", "run_query": state}
    clean_up(ti.get_template_context())
    assert query_statuses(emulator) == ["InProgress"]
    query.cancel()
    clean_up(ti.get_template_context())
    assert statuses(emulator) == ["Idle"]


@pytest.mark.usefixtures("short_wind_up")
def test_a_failed_runs_callback_cancels_nothing_that_is_submitted_after_it_has_looked(
    emulator: RunningEmulator,
    by_name: Callable[[], Any],
    ti: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def clear_after_the_look(*_: object, run_ids: list[str]) -> dict[str, dict[str, str]]:
        submit_hanging_query(emulator, by_name())
        return {run_id: {"run_query": "failed"} for run_id in run_ids}

    monkeypatch.setattr(type(ti), "get_task_states", clear_after_the_look)
    clean_up(ti.get_template_context())
    assert query_statuses(emulator) == ["InProgress"]


@pytest.mark.usefixtures("short_wind_up")
def test_a_failed_runs_callback_leaves_a_cluster_that_others_are_using(
    by_name: Callable[[], Any], emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(run_id="manual__1"):
        start_cluster("shop", SPEC)
        submit_hanging_query(emulator, by_name())
    with start_try(run_id="manual__2") as ti:
        start_cluster("shop", SPEC)
        clean_up(ti.get_template_context())
    assert query_statuses(emulator) == ["InProgress"]
    assert statuses(emulator) == ["Running"]
