"""The DAGs on two Celery workers, with Redis as the broker."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from polars_cloud_emulator.testing import eventually
from tests.eight_dags import KEPT
from tests.failures.deployment import QUICK_INTERVALS, Deployment, free_ports, running_deployment
from tests.failures.events import LONG, let_queries_end

WORKERS = {
    name: f"celery worker --skip-serve-logs --concurrency 3 --celery-hostname {name}@%h"
    for name in ("first", "second")
}


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert shutil.which("redis-server"), "install Debian's package redis-server, or your system's"
    port = free_ports(1)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(
        command, cwd=tmp_path_factory.mktemp("redis"), stdout=subprocess.DEVNULL
    ) as server:
        try:
            eventually(lambda: answers(port))
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.terminate()


def answers(port: int) -> bool:
    with redis.Redis(port=port) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


@pytest.fixture(scope="session")
def airflow(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    settings = {
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW__CELERY__BROKER_URL": f"{redis_url}/0",
        "AIRFLOW__CELERY__RESULT_BACKEND": f"{redis_url}/1",
        **QUICK_INTERVALS,
    }
    folder: Path = tmp_path_factory.mktemp("deployment")
    with (
        running_deployment(folder, options=settings) as deployment,
        deployment.running(*WORKERS.values()),
    ):
        deployment.patience = 300.0  # eight DAGs at once on six slots
        yield deployment


def test_every_pattern_succeeds_on_two_workers(airflow: Deployment) -> None:
    runs = [airflow.trigger(dag_id) for dag_id in sorted(KEPT)]
    for run in runs:
        run.wait_for_end()
        assert (run.state, run.tries()) == ("success", 1), run.log()[-6000:]
    emulator = airflow.emulator
    eventually(lambda: not emulator.running_queries())
    assert {query["status"] for query in emulator.queries()} == {"Success"}
    assert all(query["n_rows"] for query in emulator.queries())


@pytest.mark.dag("context_manager_shutdown")
def test_a_query_whose_worker_is_killed_is_resumed_on_the_other_one(airflow: Deployment) -> None:
    airflow.end_runs()
    airflow.emulator.api.add_fault("SubmitQuery", "query_takes", seconds=LONG)
    run = airflow.trigger("context_manager_shutdown")
    airflow.eventually(airflow.emulator.running_queries)
    [task_id] = run.running_tasks()
    session = os.getsid(run.process(task_id).pid)
    [worker] = [each for each in WORKERS.values() if airflow.processes[each].pid == session]
    airflow.kill(worker)
    airflow.eventually(lambda: "Resuming query" in run.log(task_id, "2"))
    let_queries_end(airflow, run)
    run.wait_for_end()
    assert (run.state, run.tries(task_id)) == ("success", 2), run.log()[-6000:]
    [query] = airflow.emulator.queries()
    assert (query["status"], query["cancels"]) == ("Success", 0)
