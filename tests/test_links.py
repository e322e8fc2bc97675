"""`links.py`: the link from a task to its query's page."""

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import httpx
import polars as pl
import pytest
from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG, BaseOperator, task
from airflow.serialization.serialized_objects import DagSerialization

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import query_task, use_cluster
from polars_remote.cloud.client import get_cluster_id
from polars_remote.links import QueryLink
from tests.observed import query_statuses
from tests.tries import StartTry

FILE = "s3://your-bucket/results/two.parquet"
TWO_ROWS = pl.LazyFrame({"x": [1, 2]})
CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}


def stored_links(task: BaseOperator) -> dict[str, str]:
    """Return what Airflow's worker stores after the task, by the key of the XCom."""
    return {
        each.xcom_key: each.get_link(task, ti_key=None)  # type: ignore[arg-type]
        for each in task.operator_extra_links
    }


def run_query(ctx: Any, uri: str = FILE) -> Any:
    return TWO_ROWS.remote(ctx).single_node().sink_parquet(uri)


def test_each_task_that_runs_a_function_has_the_link_and_other_tasks_have_none() -> None:
    def function(x: int = 1) -> None: ...

    with DAG("shop", schedule=None) as dag:
        task(task_id="plain")(function)()
        task(task_id="mapped")(function).expand(x=[1, 2])
        task.branch(task_id="branch")(function)()
        task.short_circuit(task_id="short_circuit")(function)()
        query_task(task_id="deferring")(function)()
        query_task(task_id="mapped_deferring")(function).expand(x=[1, 2])
        PythonOperator(task_id="operator", python_callable=function)
        PythonOperator.partial(task_id="mapped_operator", python_callable=function).expand(
            op_args=[[1], [2]]
        )
        BashOperator(task_id="bash", bash_command="true")
        BaseOperator(task_id="base")
    in_api_server: Any = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    assert {each.task_id: each.extra_links for each in in_api_server.tasks} == {
        each.task_id: [] if each.task_id in ("bash", "base") else ["Polars Cloud query"]
        for each in dag.tasks
    }


def test_the_worker_stores_the_page_of_a_plain_tasks_query(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try() as ti, use_cluster(CLUSTER, stop=False) as ctx:
        run_query(ctx).await_result()
    [query] = emulator.state()["queries"]
    [(key, page)] = stored_links(ti.task).items()
    assert page.endswith(f"/{query['cluster_id']}/queries/{query['id']}")
    assert key == QueryLink().xcom_key


@pytest.mark.parametrize("mode", ["direct", "proxy"])
def test_the_link_opens_the_page_of_a_mapped_tasks_query(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_try: StartTry,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    portal = emulator.environment["POLARS_CLOUD_PORTAL"]
    monkeypatch.setattr("polars_remote.cloud.queries.PORTAL", portal)
    cluster = {**CLUSTER, "connection_mode": mode}
    with start_try(map_index=3) as ti, use_cluster(cluster, stop=False) as ctx:
        run_query(ctx).await_result()
    [page] = stored_links(ti.task).values()
    answer = httpx.get(page, trust_env=False)
    assert answer.status_code == 200
    assert "run_query[3]" in answer.text


def test_an_operator_may_have_a_page_of_its_own(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    with DAG("shop", schedule=None):
        reader: Any = BaseOperator(task_id="run_query")
    reader.page = 3
    with start_try(task=reader) as ti, use_cluster(CLUSTER, stop=False) as ctx:
        run_query(ctx).await_result()
    [query] = emulator.state()["queries"]
    [page] = stored_links(ti.task).values()
    assert page.endswith(f"/queries/{query['id']}")
    assert reader.page == 3


def test_the_worker_stores_no_link_of_a_task_without_a_query(
    pc: ModuleType, start_try: StartTry
) -> None:
    with start_try() as ti, use_cluster(CLUSTER, stop=False):
        pass
    assert stored_links(ti.task) == {}


def test_the_link_of_several_queries_leads_to_the_first(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try() as ti, use_cluster(CLUSTER, stop=False) as ctx:
        for number in range(3):
            run_query(ctx, f"s3://your-bucket/results/{number}.parquet").await_result()
    [page] = stored_links(ti.task).values()
    assert page.endswith(f"/queries/{emulator.state()['queries'][0]['id']}")


def test_the_link_leads_to_a_query_that_has_failed(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", error="SchemaError: no such type")
    with start_try(raises=pl.exceptions.SchemaError) as ti, use_cluster(CLUSTER, stop=False) as ctx:
        run_query(ctx).await_result()
    [query] = emulator.state()["queries"]
    [page] = stored_links(ti.task).values()
    assert page.endswith(f"/queries/{query['id']}")


def test_the_link_leads_to_the_query_that_replaces_one_whose_cluster_was_stopped(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry
) -> None:
    def stop(cluster_id: str | None) -> None:
        eventually(lambda: query_statuses(emulator) == ["InProgress"])
        emulator.call("POST", f"compute/{cluster_id}/stop")

    with (
        start_try() as ti,
        use_cluster(CLUSTER, stop=False) as ctx,
        ThreadPoolExecutor() as background,
    ):
        emulator.add_fault("SubmitQuery", "query_hangs")
        query = run_query(ctx)
        background.submit(stop, get_cluster_id(ctx))
        query.await_result()
    [_, second] = emulator.state()["queries"]
    [page] = stored_links(ti.task).values()
    assert page.endswith(f"/queries/{second['id']}")
