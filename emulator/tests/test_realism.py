"""The realistic mode: delays, expiry and file names."""

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

import boto3
import pytest

from emulator.tests.raw_calls import CLUSTER, WORKSPACE, rest_client
from polars_cloud_emulator.model.realism import REALISTIC
from polars_cloud_emulator.testing import RunningEmulator, eventually, running_emulator

QUERY = """
ctx = pc.ComputeContext.connect("{cluster}", workspace="playground")
query = pl.LazyFrame({{"x": [1, 2]}}).remote(ctx).single_node()
"""

RunClient = Callable[[Mapping[str, str], str], str]


@pytest.fixture(scope="module")
def running_realistic() -> Iterator[RunningEmulator]:
    with running_emulator(realistic=True) as emulator:
        yield emulator


@pytest.fixture
def realistic(running_realistic: RunningEmulator) -> RunningEmulator:
    running_realistic.reset()
    return running_realistic


@pytest.fixture
def cluster_id(realistic: RunningEmulator) -> str:
    """Start a cluster without the client, which polls only every 30 s."""
    cluster = realistic.call("POST", "compute/start", CLUSTER)
    assert cluster["status"] == "Starting"
    eventually(lambda: realistic.state()["clusters"][-1]["status"] == "Idle")
    return str(cluster["id"])


def keys(emulator: RunningEmulator, bucket: str) -> list[str]:
    environment = emulator.environment
    s3 = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
    )
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.mark.usefixtures("cluster_id")
def test_a_cluster_starts_in_minutes_on_a_fast_clock(realistic: RunningEmulator) -> None:
    [cluster] = realistic.state()["clusters"]
    assert cluster["billed_seconds"] >= REALISTIC.startup.total_seconds()


def test_a_login_does_not_age_while_clusters_start(realistic: RunningEmulator) -> None:
    with rest_client(realistic.environment) as rest:
        for _ in range(3):
            rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER).raise_for_status()
            eventually(lambda: realistic.state()["clusters"][-1]["status"] == "Idle")


def test_files_of_an_earlier_run_stay_in_a_directory(
    realistic: RunningEmulator, run_client: RunClient, cluster_id: str
) -> None:
    write = 'query.sink_parquet("s3://your-bucket/twice/")\n'
    read = 'print(pl.scan_parquet("s3://your-bucket/twice/").remote(ctx).single_node().execute()'
    code = QUERY.format(cluster=cluster_id) + write + write + read + ".head.height)"
    assert run_client(realistic.environment, code) == "4"


def test_a_result_without_a_destination_expires(
    realistic: RunningEmulator, run_client: RunClient, cluster_id: str
) -> None:
    run_client(realistic.environment, QUERY.format(cluster=cluster_id) + "query.execute()")
    assert len(keys(realistic, "polars-cloud-temporary")) == 1
    realistic.advance_clock(REALISTIC.result_lifetime or timedelta(0))
    eventually(lambda: keys(realistic, "polars-cloud-temporary") == [])
