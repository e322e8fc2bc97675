"""Sinks whose rows would be lost, or that would fail, are refused at submission."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import httpx
import polars as pl
import pytest

from emulator.tests.raw_calls import WORKSPACE
from polars_cloud_emulator.testing import RunningEmulator

StartCluster = Callable[..., Any]

DISK = "a local path is on the disk of a worker"
SCHEME = "Polars writes to s3://, gs:// and az://, not to"
BUCKET = "is not a bucket name of S3"
NAME = "the path in the bucket is empty, or has a part that is empty"
PATTERN = "a scan would treat"

REFUSED = {
    "": DISK,
    "out/x/": DISK,
    "/srv/out/x/": DISK,
    "~/out/": DISK,
    "file:///srv/out/": DISK,
    "s3:/your-bucket/x/": DISK,
    "s3://": BUCKET,
    "s3:///x/": BUCKET,
    "s3://Your_Bucket/x/": BUCKET,
    "s3://user@your-bucket/x/": BUCKET,
    "s3://your-bucket:80/x/": BUCKET,
    "s3://your-bucket": NAME,
    "s3://your-bucket/": NAME,
    "s3://your-bucket//x/": NAME,
    "s3://your-bucket/x/../y/": NAME,
    "gs://my-bucket": NAME,
    "s3://your-bucket/*/": PATTERN,
    "s3://your-bucket/x?/": PATTERN,
    "s3://your-bucket/x[1]/": PATTERN,
    "S3://your-bucket/x/": SCHEME,
    "hf://datasets/me/x/": SCHEME,
    "https://your-bucket.s3.amazonaws.com/x/": SCHEME,
    "memory://x/": SCHEME,
}


def frame() -> pl.LazyFrame:
    return pl.LazyFrame({"x": [1, 2, 3]})


def with_ndjson(context: Any, uri: str) -> Any:
    sinks = [
        frame().sink_parquet("s3://your-bucket/good/", lazy=True),
        frame().sink_ndjson(uri, lazy=True),
    ]
    return pl.collect_all(sinks, lazy=True).remote(context).execute()


SINKS: dict[str, Callable[[Any, str], Any]] = {
    "parquet": lambda context, uri: frame().remote(context).single_node().sink_parquet(uri),
    "csv": lambda context, uri: frame().remote(context).single_node().sink_csv(uri),
    "ipc": lambda context, uri: frame().remote(context).single_node().sink_ipc(uri),
    "partitions": lambda context, uri: (
        frame().remote(context).sink_parquet(pl.PartitionBy(uri, key="x"))
    ),
    "the second of two": with_ndjson,
}


@pytest.mark.parametrize("sink", SINKS.values(), ids=SINKS)
def test_sink_whose_rows_would_be_lost_is_refused_with_a_clear_error(
    emulator: RunningEmulator, start_cluster: StartCluster, sink: Callable[[Any, str], Any]
) -> None:
    context = start_cluster()
    for uri, reason in REFUSED.items():
        with pytest.raises(pl.exceptions.ComputeError) as refusal:
            sink(context, uri)
        assert str(refusal.value).startswith("cannot write to '"), uri
        assert reason in str(refusal.value), uri
    assert emulator.state()["queries"] == []


def test_two_sinks_to_one_place_are_refused(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    for first, second in [("x.csv", "x.csv"), ("x/", "x"), ("x", "x/")]:
        sinks = [
            frame().sink_csv(f"s3://your-bucket/{name}", lazy=True) for name in (first, second)
        ]
        with pytest.raises(pl.exceptions.ComputeError, match="two sinks of this query write to"):
            pl.collect_all(sinks, lazy=True).remote(context).execute()
    assert emulator.state()["queries"] == []


ELSEWHERE = ["gs://my-bucket/x/", "az://my-container/x/", "abfss://c@a.dfs.core.windows.net/x/"]
OPTIONS = {"gs": {"skip_signature": "true"}, "az": {"account_name": "me", "account_key": "AA=="}}


@pytest.fixture
def not_run(emulator: RunningEmulator) -> Iterator[None]:
    """Make each query of the test fail after its submission."""
    emulator.add_fault("SubmitQuery", "query_fails", times=1000, error="ValueError: not run")
    yield
    emulator.clear_faults()


@pytest.mark.parametrize("uri", ELSEWHERE)
def test_google_and_azure_are_refused_without_credentials(
    emulator: RunningEmulator, start_cluster: StartCluster, not_run: None, uri: str
) -> None:
    context = start_cluster()
    for query in (
        lambda: frame().remote(context).sink_parquet(uri),
        lambda: pl.scan_parquet(uri).remote(context).execute(),
        lambda: frame().join(pl.scan_csv(uri), on="x").remote(context).execute(),
    ):
        with pytest.raises(pl.exceptions.ComputeError, match=f"no credentials for '{uri}'"):
            query()
    assert emulator.state()["queries"] == []


@pytest.mark.parametrize("uri", ELSEWHERE)
def test_google_and_azure_are_accepted_with_credentials(
    start_cluster: StartCluster, not_run: None, uri: str
) -> None:
    options = OPTIONS["gs" if uri.startswith("gs") else "az"]
    context = start_cluster()
    with_variables = start_cluster(env_vars={"GOOGLE_SERVICE_ACCOUNT": "x", "AZURE_CLIENT_ID": "x"})
    for query in (
        lambda: frame().remote(context).sink_parquet(uri, storage_options=options),
        lambda: frame().remote(context).sink_parquet(uri, credential_provider=lambda: ({}, None)),
        lambda: frame().remote(with_variables).sink_parquet(uri),
        lambda: (
            pl.scan_parquet(uri, storage_options=options).remote(context).execute(blocking=False)
        ),
    ):
        with pytest.raises(ValueError, match="not run"):
            query().await_result()


@pytest.mark.parametrize("collect", ["collect", "collect_batches"])
def test_collect_is_refused_at_submission(
    emulator: RunningEmulator,
    pc: ModuleType,
    start_cluster: StartCluster,
    rest: httpx.Client,
    collect: str,
) -> None:
    path = f"{WORKSPACE}/compute/{start_cluster()._compute_id}/public_info"
    info = rest.get(path).json()
    context = pc.ClusterContext(
        f"https://{info['scheduler']['address']}",
        domain_name=info["scheduler"]["tls_server_name"],
        tls_options=pc.TLSOptions(ca_cert=info["public_server_key"].encode()),
        extra_headers={"authorization": rest.headers["authorization"]},
    )
    assert frame().remote(context).execute().n_rows_total == 3
    with pytest.raises(pl.exceptions.ComputeError, match="the emulator does not send rows to the"):
        getattr(frame().remote(context), collect)()
    assert len(emulator.state()["queries"]) == 1
