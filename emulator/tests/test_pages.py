"""What a person sees of the emulator in a browser."""

import contextlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from typing import Any

import httpx
import polars as pl
import psutil
import pytest

from emulator.tests.blocking_query import BlockingQuery
from emulator.tests.raw_calls import CLUSTER, WORKSPACE
from polars_cloud_emulator.model.workspace import ORGANIZATION_ID, WORKSPACE_ID
from polars_cloud_emulator.testing import RunningEmulator, eventually

STATE = "/_emulator/state"

StartCluster = Callable[..., Any]

NAVIGATION = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
"""What a browser sends that opens an address."""


@pytest.fixture
def browser(emulator: RunningEmulator) -> Iterator[httpx.Client]:
    """Someone without a login."""
    with httpx.Client(base_url=emulator.rest_url, trust_env=False, timeout=60) as client:
        yield client


def labels(dag: str, task: str, **others: str) -> list[str]:
    return [f"{key}={value}" for key, value in {"dag": dag, "task": task, **others}.items()]


def run(context: Any, frame: pl.LazyFrame, *, given: list[str]) -> None:
    frame.remote(context).labels(given).sink_parquet("s3://your-bucket/pages/").await_result()


def text(page: str) -> str:
    """A page as it is read, without its markup."""
    return re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))


def query_page(query: dict[str, Any]) -> str:
    return f"/portal/{WORKSPACE_ID}/{query['cluster_id']}/queries/{query['id']}"


def test_page_without_a_cluster_says_what_to_do(browser: httpx.Client) -> None:
    assert "No cluster yet. Run a DAG" in text(browser.get("/").text)


def test_clusters_are_named_by_what_ran_there_the_latest_first(
    browser: httpx.Client, start_cluster: StartCluster
) -> None:
    for dag in ("first", "second"):
        context = start_cluster(cluster_size=2)
        run(
            context,
            pl.LazyFrame({"x": [1, 2]}),
            given=labels(dag, "count", map="3", **{"try": "2"}),
        )
        context.stop()
    page = text(browser.get("/").text)
    first = page.index("first 2 nodes, 4 vCPUs, stopped by its user")
    assert page.index("second 2 nodes, 4 vCPUs, stopped by its user") < first
    assert "✓ count[3], try 2 succeeded, 2 rows" in page


def numbers(pattern: str, page: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in re.findall(pattern, page)]


def test_numbers_of_the_clusters_add_up_to_those_above_them(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    for size in (1, 2, 3) * 6:  # so many that roundings do not cancel out
        context = start_cluster(cluster_size=size)
        run(context, pl.LazyFrame({"x": [1]}), given=labels("d", "t"))
        emulator.advance_clock(timedelta(seconds=3.456 * size))
        context.stop()
    page = text(browser.get("/").text)
    for amount, unit in ((r"([\d,]+\.\d{4})", " vCPU-hours"), (r"([\d,]+\.\d)", " node-seconds")):
        total, *rows = numbers(amount + unit, page)
        assert len(rows) == 18
        assert sum(rows) == total
    [total_busy] = numbers(r"a query ran in ([\d,]+\.\d) of these", page)
    assert sum(numbers(r"([\d,]+\.\d) busy", page)) == total_busy
    # Of 2 vCPUs each.
    hours, *_ = numbers(r"([\d,]+\.\d{4}) vCPU-hours", page)
    seconds, *_ = numbers(r"([\d,]+\.\d) node-seconds", page)
    assert float(hours) == pytest.approx(float(seconds) * 2 / 3600, abs=0.01)


def test_failed_query_is_named_without_opening_anything(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    bad = pl.LazyFrame({"x": ["a"]}).select(pl.col("x").cast(pl.Int8))
    run(context, pl.LazyFrame({"x": [1]}), given=labels("sales", "good"))
    for number in range(7):
        with pytest.raises(pl.exceptions.InvalidOperationError):
            run(context, bad, given=labels("sales", "bad", map=str(number)))
    page = browser.get("/").text
    seen = text(re.sub("<details>.*?</details>", "", page, flags=re.DOTALL))
    assert "✗ 7 queries failed , on sales" in seen
    assert "✗ 7 queries failed: bad[0] , bad[1] , bad[2] , bad[3] , bad[4] and 2 more" in seen
    assert "✗ bad[6]" in seen
    failed = emulator.state()["queries"][1]
    assert f'<a href="{query_page(failed)}">bad[0]</a>' in page
    assert re.search('<text class="[^"]*failed"[^>]*>✗ bad', page)


def test_cluster_that_is_still_billed_is_distinguished_from_one_that_has_ended(
    browser: httpx.Client, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    page = browser.get("/").text
    assert "1 node, 2 vCPUs, idle, still billed" in text(page)
    assert 'class="live" fill="url(#stripes)" x=' in page
    assert 'class="ended" x=' not in page
    context.stop()
    page = browser.get("/").text
    assert "1 node, 2 vCPUs, stopped by its user" in text(page)
    assert 'class="live" fill="url(#stripes)" x=' not in page
    assert 'class="ended" x=' in page


def test_legend_names_every_kind_of_bar(browser: httpx.Client, start_cluster: StartCluster) -> None:
    run(start_cluster(), pl.LazyFrame({"x": [1]}), given=labels("d", "t"))
    page = browser.get("/").text
    legend = re.findall('<ul class="legend".*?</ul>', page, re.DOTALL)[0]
    kinds = {"starting", "live", "ended", "waiting", "running", "succeeded", "failed", "canceled"}
    assert kinds <= {*re.findall('<rect class="([^"]+)"', legend)}
    assert {*re.findall('<rect class="([^"]+)"', page)} <= kinds | {"stripe"}
    assert "starting cluster, still billed cluster, ended query waiting" in text(legend)


def test_query_without_labels_is_named_by_its_id(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    pl.LazyFrame({"x": [1]}).remote(start_cluster()).execute()
    [query] = emulator.state()["queries"]
    page = text(browser.get("/").text)
    assert f"query {query['id'][:8]} succeeded" in page
    assert f"cluster {query['cluster_id'][:8]} 1 node, 2 vCPUs, idle" in page


def test_filters_leave_the_clusters_of_one_dag_or_manifest(
    browser: httpx.Client, rest: httpx.Client, start_cluster: StartCluster
) -> None:
    for dag in ("kept", "hidden"):
        run(start_cluster(), pl.LazyFrame({"x": [1]}), given=labels(dag, f"task_of_{dag}"))
    page = browser.get("/", params={"dag": "kept"}).text
    assert "task_of_kept" in page
    assert "task_of_hidden" not in page
    assert "<option selected>kept</option>" in page
    assert "task_of_kept" not in browser.get("/", params={"manifest": "nightly"}).text
    rest.post(f"{WORKSPACE}/manifest", json=CLUSTER | {"name": "nightly"})
    rest.post(f"{WORKSPACE}/manifest/start", json={"name": "nightly"})
    page = browser.get("/", params={"manifest": "nightly"}).text
    assert ">nightly</a></h2>" in page
    assert "task_of_kept" not in page


def test_running_and_waiting_queries_are_distinguished(
    browser: httpx.Client,
    start_cluster: StartCluster,
    blocking: BlockingQuery,
    background: Executor,
) -> None:
    context = start_cluster()
    blocking.lazy_frame().remote(context).labels(labels("d", "slow")).execute(blocking=False)
    blocking.wait_for_start()
    pl.LazyFrame({"x": [1]}).remote(context).labels(labels("d", "next")).execute(blocking=False)
    page = text(browser.get("/").text)
    assert "slow running" in page
    assert "next waiting" in page
    assert ">next</text>" in browser.get("/").text
    blocking.release()
    eventually(lambda: "next succeeded" in text(browser.get("/").text))


def test_start_up_is_drawn(
    emulator: RunningEmulator, browser: httpx.Client, rest: httpx.Client
) -> None:
    emulator.add_fault("POST compute/start", "startup_takes", seconds=60)
    rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER)
    emulator.advance_clock(timedelta(seconds=30))
    page = browser.get("/").text
    assert "1 node, 2 vCPUs, starting, still billed" in text(page)
    assert 'class="starting" x="0.0%" width="100.0%"' in page


def test_page_of_a_query_shows_its_details(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    frame = pl.LazyFrame({"x": [3, 1]}).sort("x")
    given = labels("sales", "sort", run="manual__2026-1~0a1b2c", run2="1-28T21:48", run3=":48")
    run(start_cluster(), frame, given=given)
    [query] = emulator.state()["queries"]
    page = text(browser.get(query_page(query)).text)
    for words in (
        "✓ succeeded on the cluster sales",
        "Rows All 2 rows x Int64 1 3 Details",
        f"Id {query['id']}",
        "Run manual__2026-11-28T21:48:48 Mode",
        "Rows 2",
        "Written to s3://your-bucket/pages/00000000.parquet",
        "Plan SINK (file) SORT BY [col(&#34;x&#34;)]",
        "Optimized plan SINK (file) SORT BY",
    ):
        assert words in page


def test_pages_that_are_asked_for_at_once_explain_two_plans_at_once(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    run(start_cluster(), pl.LazyFrame({"x": [1]}), given=labels("d", "t"))
    [query] = emulator.state()["queries"]
    process = psutil.Process(emulator.pid)
    most = 0
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(browser.get, query_page(query), timeout=60) for _ in range(5)]
        while not all(each.done() for each in asked):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by now
                commands = [str(child.cmdline()) for child in process.children()]
                most = max(most, sum("plan_text" in each for each in commands))
    assert {each.result().status_code for each in asked} == {200}
    assert 0 < most <= 2


def test_page_of_a_query_that_was_only_planned_says_so(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    pl.LazyFrame({"x": [1]}).remote(start_cluster()).explain(plan_stage="ir")
    [query] = emulator.state()["queries"]
    assert "Writes to nothing: its plan was asked for" in text(browser.get(query_page(query)).text)


def test_page_of_a_failed_query_has_its_whole_error_as_text(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    frame = pl.LazyFrame({"x": ["<script>alert(1)</script>"]}).select(pl.col("x").cast(pl.Int8))
    with pytest.raises(pl.exceptions.InvalidOperationError):
        frame.remote(start_cluster()).execute()
    [query] = emulator.state()["queries"]
    page = browser.get(query_page(query)).text
    assert "✗ failed" in text(page)
    assert "InvalidOperationError: conversion from `str` to `i8` failed" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page


def test_page_of_a_failed_query_shows_its_error_once(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        pl.LazyFrame({"x": [1]}).select("nope").remote(start_cluster()).execute()
    [query] = emulator.state()["queries"]
    page = text(browser.get(query_page(query)).text)
    assert page.count("unable to find column") == 1
    assert "Polars cannot show this plan: see the error above." in page


@pytest.mark.parametrize(
    "sink",
    [
        lambda remote: remote.sink_parquet("s3://your-bucket/rows/"),
        lambda remote: remote.sink_csv("s3://your-bucket/rows/"),
        lambda remote: remote.sink_ipc("s3://your-bucket/rows/"),
        lambda remote: remote.sink_parquet(pl.PartitionBy("s3://your-bucket/rows/", key="letter")),
        lambda remote: remote.execute(blocking=False),
    ],
    ids=["parquet", "csv", "ipc", "partitions", "temporary"],
)
def test_page_of_a_query_shows_its_first_rows(
    emulator: RunningEmulator,
    browser: httpx.Client,
    start_cluster: StartCluster,
    sink: Callable[[Any], Any],
) -> None:
    frame = pl.LazyFrame({"letter": ["a", None, "<b>"] * 4, "number": range(12)})
    sink(frame.remote(start_cluster())).await_result()
    [query] = emulator.state()["queries"]
    page = browser.get(query_page(query)).text
    assert "The first 10 of 12 rows letter String number Int64 a 0 null 1 &lt;b&gt; 2" in text(page)
    assert page.count("<tr>") == 1 + 10
    assert '<td class="number">9</td>' in page
    assert '<td class="number">10</td>' not in page


def test_page_of_several_sinks_says_whose_rows_it_shows(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    frame = pl.LazyFrame({"x": [7]})
    sinks = [
        frame.sink_ndjson("s3://your-bucket/both/x.ndjson", lazy=True),
        frame.select(pl.col("x") * 2).sink_parquet("s3://your-bucket/both/x.parquet", lazy=True),
    ]
    pl.collect_all(sinks, lazy=True).remote(start_cluster()).execute()
    [query] = emulator.state()["queries"]
    page = text(browser.get(query_page(query)).text)
    assert "1 row, of the first of 2 destinations x Int64 7" in page


def test_page_of_a_query_without_rows_says_so(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    pl.LazyFrame({"x": [1]}).filter(pl.col("x") > 1).remote(start_cluster()).execute()
    [query] = emulator.state()["queries"]
    assert "Rows No rows x Int64 Details" in text(browser.get(query_page(query)).text)


def test_link_in_the_clients_own_words_opens_the_page(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    address = (
        f"/portal/{context.organization.id}/{context.workspace.id}/compute/{context._compute_id}"
    )
    assert f"/portal/{ORGANIZATION_ID}/" in address
    page = browser.get(address)
    assert page.status_code == 200
    assert "2 CPUs and 4 GB each" in text(page.text)


def test_page_of_what_is_not_there_says_why(browser: httpx.Client) -> None:
    nobody = WORKSPACE_ID
    page = browser.get(f"/portal/{WORKSPACE_ID}/{nobody}/queries/{nobody}")
    assert page.status_code == 404
    assert f"Query {nobody} does not exist here: the emulator was started anew" in text(page.text)


@pytest.mark.parametrize("stray", [")", "/", ".", "%29."])
def test_address_with_a_stray_ending_leads_to_the_page(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster, stray: str
) -> None:
    run(start_cluster(), pl.LazyFrame({"x": [1]}), given=labels("sales", "sort"))
    [query] = emulator.state()["queries"]
    cluster = f"/portal/{ORGANIZATION_ID}/{WORKSPACE_ID}/compute/{query['cluster_id']}"
    for address, name in ((query_page(query), "query sort"), (cluster, "cluster sales")):
        page = browser.get(f"{address}{stray}", headers=NAVIGATION)
        assert page.status_code == 404
        assert f"This is the page of the {name}: {address} This is" in text(page.text)
        assert f'<a href="{address}">' in page.text


def test_unknown_address_is_a_page_for_a_browser_and_json_for_a_client(
    emulator: RunningEmulator, browser: httpx.Client
) -> None:
    for address in ("/portal/", "/clusters", "/api/v1/clusters", "/<b>"):
        page = browser.get(address, headers=NAVIGATION)
        assert page.status_code == 404
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "This is the Polars Cloud emulator" in page.text
        assert '<a href="/">All clusters</a>' in page.text
        assert "<b>" not in page.text
    assert emulator.state()["unmatched"] == []
    refused = browser.get("/clusters")
    assert (refused.status_code, refused.json()["errors"]) == (501, {})
    assert browser.post("/clusters", json={}, headers=NAVIGATION).status_code == 501
    assert len(emulator.state()["unmatched"]) == 2


def test_pages_show_no_secret_and_are_no_calls_of_a_client(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    context = start_cluster(env_vars={"API_KEY": "a-secret-of-the-user"})
    run(context, pl.LazyFrame({"x": [1]}), given=labels("d", "t"))
    [query] = emulator.state()["queries"]
    before = len(emulator.journal())
    compute = f"/portal/{ORGANIZATION_ID}/{WORKSPACE_ID}/compute/{query['cluster_id']}"
    pages = [browser.get(path) for path in ("/", query_page(query), compute)]
    secret = emulator.environment["POLARS_CLOUD_CLIENT_SECRET"]
    for page in pages:
        assert page.status_code == 200
        assert "a-secret-of-the-user" not in page.text
        assert secret not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
    assert len(emulator.journal()) == before


def test_urls_are_shown_without_passwords_and_query_strings(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    url = "https://reader:my-password@127.0.0.1:1/x.csv?part=1&X-Amz-Signature=my-signature"

    def fail(frame: pl.DataFrame) -> pl.DataFrame:
        raise ValueError(f"cannot read '{url}' now")

    context = start_cluster()
    with pytest.raises(ValueError, match="my-signature"):
        pl.LazyFrame({"x": [1]}).map_batches(fail).remote(context).execute()
    with pytest.raises(OSError, match="error sending request"):
        pl.scan_csv(url, schema={"x": pl.Int64}).remote(context).execute()
    failed, unread = emulator.state()["queries"]
    assert "cannot read 'https://reader:…@127.0.0.1:1/x.csv?…' now" in failed["error"]
    assert "[https://reader:…@127.0.0.1:1/x.csv?…]" in browser.get(query_page(unread)).text
    for path in ("/", STATE, *map(query_page, (failed, unread))):
        shown = browser.get(path).text
        assert "my-password" not in shown
        assert "my-signature" not in shown


def test_password_in_a_value_is_not_shown_where_the_value_is_cut(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    value = f"{'s' * 40} https://reader:{'my-password' * 5}@127.0.0.1/x.csv"
    run(start_cluster(), pl.LazyFrame({"x": [value]}), given=[])
    [query] = emulator.state()["queries"]
    shown = browser.get(query_page(query)).text
    assert f"{'s' * 40} https://reader:…<" in shown


def test_run_that_was_not_cut_has_no_parts(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    given = labels("sales", "sort", run="manual__7", run2="of the user's")
    run(start_cluster(), pl.LazyFrame({"x": [1]}), given=given)
    [query] = emulator.state()["queries"]
    page = text(browser.get(query_page(query)).text)
    assert "Run manual__7 Run2 of the user" in page


def test_pages_load_nothing_from_elsewhere(browser: httpx.Client) -> None:
    page = browser.get("/").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    for source in sources:
        assert source.startswith("/") or source == "data:,"
    for source in sources:
        if source.startswith("/_emulator/static/"):
            assert browser.get(source).status_code == 200


def test_many_queries_are_counted_and_the_first_are_drawn(
    emulator: RunningEmulator, browser: httpx.Client, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    for _ in range(33):
        pl.LazyFrame({"x": [1]}).remote(context).execute(blocking=False)
    eventually(lambda: all(query["ended_at"] for query in emulator.state()["queries"]))
    page = text(browser.get("/").text)
    assert "33 queries" in page
    assert "and 3 more" in page
