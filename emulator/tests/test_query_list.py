"""The list of queries, in which a submission whose response was lost can be found."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import httpx
import polars as pl
import pytest

from emulator.tests.blocking_query import BlockingQuery
from emulator.tests.raw_calls import WORKSPACE
from polars_cloud_emulator.testing import RunningEmulator

StartCluster = Callable[..., Any]
LF = pl.LazyFrame({"x": [1, 2]})


def listed(pc: ModuleType) -> list[Any]:
    """Return the client's own list."""
    from polars_cloud import constants

    queries: list[Any] = constants.API_CLIENT.get_queries(pc.Workspace("playground").id)
    return queries


def test_submission_whose_response_was_lost_is_found_by_its_destination(
    emulator: RunningEmulator,
    pc: ModuleType,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
) -> None:
    context = start_cluster()
    LF.remote(context).sink_parquet("s3://your-bucket/other/").await_result()
    emulator.add_fault("SubmitQuery", "answer_lost")
    with pytest.raises(RuntimeError, match="transport error"):
        blocking.lazy_frame().remote(context).sink_parquet("s3://your-bucket/mine/run-7/")
    blocking.wait_for_start()

    [found] = [q for q in listed(pc) if q.output_location == "s3://your-bucket/mine/run-7/"]
    [_, submitted] = emulator.state()["queries"]
    assert (str(found.id), found.cluster_id) == (submitted["id"], context._compute_id)
    assert repr(found.status_code) == "QueryStatusCodeModel.InProgress"
    assert (found.request_time <= found.started_at, found.ended_at) == (True, None)
    again = pc.ProxyQuery(found.id, found.workspace_id)
    blocking.release()
    assert again.await_result().n_rows_total == 3
    assert len(emulator.state()["queries"]) == 2


@pytest.mark.parametrize(
    ("submit", "location"),
    [
        (lambda remote: remote.execute(blocking=False), None),
        (
            lambda remote: remote.single_node().sink_csv("s3://your-bucket/mine/x.csv"),
            "s3://your-bucket/mine/x.csv",
        ),
        (
            lambda remote: remote.sink_parquet(
                pl.PartitionBy("s3://your-bucket/mine/parts/", key="x")
            ),
            "s3://your-bucket/mine/parts/",
        ),
    ],
)
def test_listed_query_keeps_its_output_location(
    pc: ModuleType,
    rest: httpx.Client,
    start_cluster: StartCluster,
    submit: Callable[[Any], Any],
    location: str | None,
) -> None:
    submit(LF.remote(start_cluster())).await_result()
    [query] = listed(pc)
    assert query.output_location == location
    assert rest.get(f"{WORKSPACE}/query/{query.id}").json()["output_location"] == location


def test_list_is_ordered_and_paged_as_asked(
    emulator: RunningEmulator, rest: httpx.Client, start_cluster: StartCluster
) -> None:
    remote = LF.remote(start_cluster())
    for _ in range(3):
        remote.execute()
    ids = [query["id"] for query in emulator.state()["queries"]]

    def page(**asked: object) -> list[str]:
        answer = rest.get(f"{WORKSPACE}/query", params={k: str(v) for k, v in asked.items()})
        return [query["id"] for query in answer.json()["result"]]

    assert page() == page(order="request_time,asc") == ids
    assert page(order="request_time,desc", limit=2) == [ids[2], ids[1]]
    assert page(order="request_time,desc", limit=2, page=2) == [ids[0]]
    refused = rest.get(f"{WORKSPACE}/query", params={"order": "colour,asc"})
    assert refused.status_code == 400
    assert "order must be one of request_time, " in refused.json()["message"]
