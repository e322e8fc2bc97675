"""An external S3 instead of the emulator's own: only with its option, and only for queries."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import polars as pl
import psutil
import pytest
from moto.backends import get_backend
from moto.server import ThreadedMotoServer

from emulator.tests.command_line import Served, command

Serve = Callable[..., Served]
RunClient = Callable[..., str]
OUTSIDE = ("--port-base", 0, "--object-store", "environment")
CONNECT = 'ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)\n'


class OutsideS3:
    """An S3 server with one bucket, which this process's ``AWS_*`` variables configure."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._client: Any = boto3.client("s3")
        self._client.create_bucket(Bucket="my-bucket")

    def objects(self) -> list[str]:
        """Return all objects of all buckets."""
        return [
            f"s3://{bucket['Name']}/{entry['Key']}"
            for bucket in self._client.list_buckets()["Buckets"]
            for entry in self._client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", [])
        ]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[OutsideS3]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a user's",
        "AWS_SECRET_ACCESS_KEY": "a user's",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # moto keeps its buckets for as long as the process runs.
    get_backend("s3").reset()
    yield OutsideS3(environment)
    server.stop()


def test_only_queries_read_and_write_the_external_s3(
    s3: OutsideS3, serve: Serve, run_client: RunClient
) -> None:
    pl.DataFrame({"x": range(12)}).write_parquet("s3://my-bucket/in/x.parquet")
    served = serve(*OUTSIDE)
    query = """
remote = pl.scan_parquet("s3://my-bucket/in/").select(pl.col("x") * 2).remote(ctx)
result = remote.sink_parquet("s3://my-bucket/out/").await_result()
print(result.location, result.n_rows_total, result.head.height)
"""
    answer = run_client(served.environment, CONNECT + query)
    assert answer == "['s3://my-bucket/out/00000000.parquet'] 12 10"
    assert pl.read_parquet("s3://my-bucket/out/")["x"].sum() == 132
    before = ["s3://my-bucket/in/x.parquet", "s3://my-bucket/out/00000000.parquet"]
    assert s3.objects() == before
    served.reset()
    assert served.stop() == (0, "", "")
    assert s3.objects() == before


def test_result_without_a_destination_stays_on_this_machine_until_a_reset(
    s3: OutsideS3, serve: Serve, run_client: RunClient, tmp_path: Path
) -> None:
    options = (*OUTSIDE, "--state-dir", tmp_path / "state")
    served = serve(*options)
    query = """
result = pl.LazyFrame({"x": range(12)}).remote(ctx).execute()
assert (result.n_rows_total, result.head["x"].to_list()) == (12, list(range(10)))
assert result.lazy().collect().height == 12
print(*result.location)
"""
    location = Path(run_client(served.environment, CONNECT + query))
    assert served.stop() == (0, "", "")
    served = serve(*options)
    assert location.is_relative_to(tmp_path / "state")
    assert pl.read_parquet(location).height == 12
    served.reset()
    assert not location.exists()
    assert s3.objects() == []


def test_query_uses_no_other_file_of_this_machine(
    s3: OutsideS3, serve: Serve, run_client: RunClient, tmp_path: Path
) -> None:
    served = serve(*OUTSIDE, "--state-dir", tmp_path / "state")
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "state" / "mine.parquet")
    query = """
from pathlib import Path
[location] = pl.LazyFrame({"x": range(12)}).remote(ctx).execute().location
results = Path(location).parents[1]
print(pl.scan_parquet(location).remote(ctx).execute().n_rows_total)
for use in (
    lambda: pl.scan_parquet(f"{results}/../mine.parquet").remote(ctx).execute(),
    lambda: pl.LazyFrame({"x": [1]}).remote(ctx).sink_parquet(f"{results}/mine/").await_result(),
):
    try:
        use()
    except (FileNotFoundError, pl.exceptions.ComputeError) as error:
        print(type(error).__name__)
"""
    answer = run_client(served.environment, CONNECT + query).split()
    assert answer == ["12", "FileNotFoundError", "ComputeError"]


def test_env_file_names_the_external_s3_and_no_own_s3_listens(
    s3: OutsideS3, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "")
    served = serve(*OUTSIDE)
    assert s3.environment == {
        name: value for name, value in served.environment.items() if name.startswith("AWS_")
    }
    connections = psutil.Process(served.pid).net_connections("inet")
    assert [c.status for c in connections].count(psutil.CONN_LISTEN) == 2


def test_aws_variables_of_a_shell_are_ignored_unless_asked_for(
    s3: OutsideS3, serve: Serve, run_client: RunClient
) -> None:
    served = serve("--port-base", 0)
    assert served.environment["AWS_ENDPOINT_URL"] != s3.environment["AWS_ENDPOINT_URL"]
    query = """
pl.LazyFrame({"x": [1]}).remote(ctx).sink_parquet("s3://your-bucket/mine/").await_result()
"""
    run_client(served.environment, CONNECT + query)
    assert s3.objects() == []


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("AWS_ACCESS_KEY_ID", "", "set AWS_ACCESS_KEY_ID"),
        ("AWS_SECRET_ACCESS_KEY", "", "set AWS_SECRET_ACCESS_KEY"),
        (
            "AWS_ENDPOINT_URL",
            "minio:9000",
            "AWS_ENDPOINT_URL must begin with http:// or https://, not minio:9000",
        ),
    ],
)
def test_start_without_a_usable_object_store_is_refused_in_one_sentence(
    s3: OutsideS3, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    ran = subprocess.run(command(*OUTSIDE), capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"polars_cloud_emulator: --object-store environment: {sentence}\n"
