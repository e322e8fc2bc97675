"""Clusters: worker processes, status, idle timeout and start-up delay."""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import polars as pl
import psutil
import pytest

from emulator.tests.blocking_query import BlockingQuery
from emulator.tests.processes import is_running, none_running
from emulator.tests.raw_calls import CLUSTER, WORKSPACE, rest_client
from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.testing import RunningEmulator, eventually

StartCluster = Callable[..., Any]
StartEmulator = Callable[..., RunningEmulator]
RunClient = Callable[..., str]


def worker_pids(emulator: RunningEmulator, count: int) -> list[int]:
    def pids() -> list[int]:
        [cluster] = emulator.state()["clusters"]
        return cluster["worker_pids"]

    eventually(lambda: len(pids()) == count)
    return pids()


def test_worker_process_starts_when_a_query_needs_one_and_ends_with_its_cluster(
    emulator: RunningEmulator, start_cluster: StartCluster, tmp_path: Path
) -> None:
    context = start_cluster(cluster_size=100)
    worker_pids(emulator, 1)
    for number in range(3):
        blocking = BlockingQuery(tmp_path / str(number))
        blocking.lazy_frame().remote(context).single_node().execute(blocking=False)
        blocking.wait_for_start()
    pids = worker_pids(emulator, 3)
    assert all(map(is_running, pids))
    context.stop()
    assert none_running(pids)
    [cluster] = emulator.state()["clusters"]
    assert (cluster["status"], cluster["worker_pids"]) == ("Stopped", [])
    assert cluster["termination_reason"] == "StoppedByUser"


def test_worker_gets_the_environment_variables_of_its_cluster(start_cluster: StartCluster) -> None:
    def region(df: pl.DataFrame) -> pl.DataFrame:
        import os

        return df.select(region=pl.lit(os.environ["SHOP_REGION"]))

    context = start_cluster(env_vars={"SHOP_REGION": "North"})
    result = pl.LazyFrame({"region": [""]}).map_batches(region).remote(context).execute()
    assert result.head.item() == "North"


def test_worker_that_has_read_from_s3_takes_no_cpu_while_it_waits(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    sales = pl.scan_parquet("s3://your-bucket/sales/*.parquet")
    sales.select(pl.len()).remote(context).execute()
    [pid] = worker_pids(emulator, 1)
    worker = psutil.Process(pid)
    eventually(lambda: worker.cpu_percent(interval=2) < 2, 20)  # after cleaning up the query


def test_status_follows_the_cluster(
    pc: ModuleType, start_cluster: StartCluster, blocking: BlockingQuery
) -> None:
    status = pc.ComputeContextStatus
    context = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    assert context.get_status() is status.UNINITIALIZED
    context.start()
    assert context.get_status() is status.IDLE
    query = blocking.lazy_frame().remote(context).execute(blocking=False)
    assert context.get_status() is status.RUNNING
    blocking.release()
    query.await_result()
    assert context.get_status() is status.IDLE

    other = pc.ComputeContext.connect(context._compute_id, workspace="playground")
    context.stop()
    assert other.get_status() is status.STOPPED
    with pytest.raises(RuntimeError, match="Context is in an incorrect state"):
        pc.ComputeContext.connect(context._compute_id, workspace="playground")


def test_another_process_connects_by_id_and_shares_the_cluster(
    emulator: RunningEmulator, start_cluster: StartCluster, run_client: RunClient
) -> None:
    cluster_id = start_cluster()._compute_id
    code = f"""
ctx = pc.ComputeContext.connect("{cluster_id}", workspace="playground")
print(pl.LazyFrame({{"x": [1, 2]}}).remote(ctx).execute().n_rows_total)
"""
    assert run_client(emulator.environment, code) == "2"
    [query] = emulator.state()["queries"]
    assert query["cluster_id"] == str(cluster_id)


def test_stopping_twice_is_quiet_and_changes_nothing(
    emulator: RunningEmulator, start_cluster: StartCluster, rest: httpx.Client
) -> None:
    context = start_cluster()
    context.stop()
    first = emulator.state()["clusters"]
    assert rest.post(f"{WORKSPACE}/compute/{context._compute_id}/stop").status_code == 204
    assert emulator.state()["clusters"] == first


def test_stopped_cluster_refuses_queries_at_once(
    pc: ModuleType, emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    unaware = pc.ComputeContext.connect(context._compute_id, workspace="playground")
    pl.LazyFrame({"x": [1]}).remote(unaware).execute()
    context.stop()
    with pytest.raises(RuntimeError, match="is Stopped: it accepts no queries"):
        pl.LazyFrame({"x": [1]}).remote(unaware).execute()
    assert len(emulator.state()["queries"]) == 1


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"cluster_size": 0}, "cluster_size must be at least 1, not 0"),
        ({"cluster_size": 10_000}, "cluster_size must be at most 100, not 10000: the emulator has"),
        ({"cluster_size": "many"}, "Expected `int`, got `str` - at `$.cluster_size`"),
        ({"specs": {"cpus": 100_000, "ram_gb": 4}}, "cpus must be at most 896, not 100000"),
        ({"storage": 0}, "storage must be at least 1, not 0"),
        ({"labels": ["x" * 10**6]}, "must have from 1 to 32 bytes"),
        ({"mode": None}, "cannot decode the body"),
    ],
)
@pytest.mark.parametrize("path", ["/compute/start", "/manifest"])
def test_impossible_cluster_is_refused_with_a_clear_error(
    emulator: RunningEmulator, rest: httpx.Client, path: str, changed: dict[str, Any], expected: str
) -> None:
    answer = rest.post(f"{WORKSPACE}{path}", json=CLUSTER | {"name": "a"} | changed)
    assert answer.status_code == 400
    assert answer.json()["errors"] == {}
    assert expected in answer.json()["message"]
    assert len(answer.json()["message"]) < 300
    assert emulator.state()["clusters"] == emulator.state()["manifests"] == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"python_version": {"major": 3, "minor": 10, "patch": 4}}, "start the emulator with the"),
        ({"polars_version": "1.44.2"}, "workers run Polars"),
    ],
)
def test_cluster_of_another_version_is_refused_with_a_clear_error(
    emulator: RunningEmulator, rest: httpx.Client, changed: dict[str, Any], expected: str
) -> None:
    answer = rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER | changed)
    assert answer.status_code == 400
    assert expected in answer.json()["message"]
    assert emulator.state()["clusters"] == []


def test_client_shows_the_message_of_an_error(start_cluster: StartCluster) -> None:
    with pytest.raises(ValueError, match="idle_timeout_mins must be at least 10"):
        start_cluster(idle_timeout_mins=9)
    with pytest.raises(ValueError, match="cluster_size must be at most 100, not 10000"):
        start_cluster(cluster_size=10_000)
    start_cluster(idle_timeout_mins=10)


def test_cluster_of_an_instance_type_that_aws_has_starts(pc: ModuleType) -> None:
    context = pc.ComputeContext(workspace="playground", instance_type="m5.large")
    context.start()
    assert context.get_status().is_started()


@pytest.mark.parametrize("workspace", ["nowhere", "play", ""])
def test_workspace_that_the_account_does_not_have_is_not_found(
    pc: ModuleType, workspace: str
) -> None:
    with pytest.raises(pc.exceptions.WorkspaceResolveError, match=f"'{workspace}' does not exist"):
        pc.ComputeContext(workspace=workspace, cpus=2, memory=4)
    assert [each.name for each in pc.Workspace.list()] == ["playground"]


@pytest.mark.parametrize("broken", [{"POLARS_FORCE_PKG": "none"}, {"NOT=A=NAME": ""}])
def test_cluster_whose_workers_cannot_start_has_failed(
    emulator: RunningEmulator, start_cluster: StartCluster, broken: dict[str, str]
) -> None:
    # The client may see the cluster before or after its workers have failed.
    with contextlib.suppress(RuntimeError):
        start_cluster(env_vars=broken)
    eventually(lambda: emulator.state()["clusters"][0]["status"] == "Failed")
    [cluster] = emulator.state()["clusters"]
    assert cluster["termination_reason"] == "Failed"
    assert cluster["worker_pids"] == []
    with rest_client(emulator.environment) as rest:
        model = rest.get(f"{WORKSPACE}/compute/{cluster['id']}").json()
    assert "a worker could not start" in model["termination"]["termination_message"]


def test_query_that_is_canceled_while_its_worker_starts_never_runs(
    pc: ModuleType, start_cluster: StartCluster, blocking: BlockingQuery
) -> None:
    context = start_cluster()
    query = blocking.lazy_frame().remote(context).execute(blocking=False)
    query.cancel()
    after = pl.LazyFrame({"x": [1]}).remote(context).execute()
    assert after.status is pc.QueryStatus.SUCCESS
    assert query.get_status() is pc.QueryStatus.CANCELED
    assert not blocking.has_started


def test_idle_timeout_stops_a_cluster_that_does_nothing(
    emulator_here: StartEmulator, run_client: RunClient, blocking: BlockingQuery
) -> None:
    clock = Clock()
    emulator = emulator_here(clock=clock)

    def clusters() -> dict[int, dict[str, Any]]:
        return {cluster["idle_timeout_mins"]: cluster for cluster in emulator.state()["clusters"]}

    start_and_query = f"""
from pathlib import Path
from emulator.tests.blocking_query import BlockingQuery
for minutes in (10, 15, 20):
    ctx = pc.ComputeContext(
        workspace="playground", cpus=2, memory=4, idle_timeout_mins=minutes
    )
    ctx.start()
blocking = BlockingQuery(Path("{blocking.directory}"))
blocking.lazy_frame().remote(ctx).execute(blocking=False)
"""
    run_client(emulator.environment, start_and_query)
    blocking.wait_for_start()
    pids = clusters()[10]["worker_pids"]

    clock.advance(timedelta(minutes=12))
    eventually(lambda: clusters()[10]["status"] == "Stopped")
    assert clusters()[15]["status"] == "Idle"
    assert clusters()[10]["termination_reason"] == "StoppedInactive"
    assert 12 * 60 <= clusters()[10]["billed_seconds"] < 13 * 60
    assert none_running(pids)

    clock.advance(timedelta(hours=1))
    eventually(lambda: clusters()[15]["status"] == "Stopped")
    assert clusters()[20]["status"] == "Running"
    blocking.release()
    eventually(lambda: clusters()[20]["status"] == "Idle")
    clock.advance(timedelta(minutes=20))
    eventually(lambda: clusters()[20]["status"] == "Stopped")

    with rest_client(emulator.environment) as rest:
        model = rest.get(f"{WORKSPACE}/compute/{clusters()[20]['id']}").json()
    assert model["termination"]["termination_reason"] == "StoppedInactive"
    assert model["termination"]["termination_message"] == "idle timeout"


def test_query_submitted_while_the_cluster_starts_waits_for_it(
    emulator_here: StartEmulator, run_client: RunClient
) -> None:
    clock = Clock()
    emulator = emulator_here(clock=clock)
    emulator.add_fault("POST compute/start", "startup_takes", seconds=120)
    with rest_client(emulator.environment) as rest:
        # Without the client, which polls a starting cluster only every 30 s.
        cluster = rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER).json()
        assert cluster["status"] == "Starting"
        submit = f"""
ctx = pc.ComputeContext.connect("{cluster["id"]}", workspace="playground")
print(ctx.get_status().name)
print(pl.LazyFrame({{"x": [1]}}).remote(ctx).execute(blocking=False).get_status().name)
"""
        assert run_client(emulator.environment, submit).split() == ["STARTING", "SCHEDULED"]
        clock.advance(timedelta(minutes=2))
        eventually(lambda: emulator.state()["queries"][0]["status"] == "Success")
        assert rest.get(f"{WORKSPACE}/compute/{cluster['id']}").json()["status"] == "Idle"
