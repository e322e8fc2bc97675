"""Many queries on few worker slots."""

import pytest

from polars_cloud_emulator.testing import eventually
from tests.failures.deployment import Deployment

QUERIES = 50


@pytest.mark.deferred
def test_fifty_queries_are_held_without_a_task_process_and_all_end_with_their_run(
    airflow: Deployment,
) -> None:
    emulator = airflow.emulator
    emulator.api.add_fault("SubmitQuery", "query_waits", seconds=3600, times=QUERIES)
    run = airflow.trigger("held_queries")

    def held() -> bool:
        return len(run.tasks_in("deferred")) == QUERIES and not airflow.count_task_processes()

    eventually(held, 600, pause=0.3)
    assert len(emulator.running_queries()) == QUERIES
    run.mark("failed")
    airflow.eventually(lambda: not emulator.running_queries() and not emulator.live_clusters())
    assert [query["status"] for query in emulator.queries()] == ["Canceled"] * QUERIES
