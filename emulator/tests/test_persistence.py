"""Acknowledged changes and written objects survive SIGKILL at any time."""

import contextlib
import random
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import grpc
import httpx
import msgspec
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from emulator.tests.command_line import Served
from emulator.tests.disks import full_disk
from emulator.tests.raw_calls import (
    CLUSTER,
    CONTROL_PLANE,
    VERSIONS,
    WORKSPACE,
    access_token,
    call_grpc,
    rest_client,
)
from polars_cloud_emulator.storage.persisted_objects import PersistedObjects

BUCKET = "your-bucket"
KILLS = 6
KEYS = ["a", "a/b", "a+", "=", "ü/%2F x", "k" * 900, "a" + "/" * 300]

Restart = Callable[[], Served]


def s3_client(served: Served) -> Any:
    environment = served.environment
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
    )


def kill(served: Served) -> None:
    served.process.send_signal(signal.SIGKILL)
    served.process.wait(30)


@pytest.fixture
def restart(serve: Callable[..., Served], tmp_path: Path) -> Restart:
    return lambda: serve("--port-base", 0, "--state-dir", tmp_path / "state")


@pytest.fixture
def s3(serve: Callable[..., Served]) -> Iterator[Any]:
    with contextlib.closing(s3_client(serve("--port-base", 0))) as client:
        yield client


def test_acknowledged_changes_survive_each_of_many_kills(restart: Restart) -> None:
    told_objects: dict[str, bytes] = {}
    told_manifests: set[str] = set()
    told_clusters: set[str] = set()

    def write_objects(served: Served, round_: int, done: threading.Event) -> None:
        s3 = s3_client(served)
        for number in range(100_000):
            key, content = f"{round_}/{number % 7}", f"{round_} {number}".encode() * 1000
            try:
                s3.put_object(Bucket=BUCKET, Key=key, Body=content)
            except (BotoCoreError, ClientError):
                # Either the object in flight is there, or the previous one.
                told_objects.pop(key, None)
                return
            told_objects[key] = content
            done.set()

    def register(served: Served, round_: int, done: threading.Event) -> None:
        with contextlib.suppress(httpx.HTTPError), rest_client(served.environment) as rest:
            started = rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER)
            told_clusters.add(started.json()["id"])
            for number in range(100_000):
                name = f"m-{round_}-{number}"
                rest.post(f"{WORKSPACE}/manifest", json=CLUSTER | {"name": name})
                told_manifests.add(name)
                done.set()

    moments = random.Random(1)
    for round_ in range(KILLS):
        served = restart()
        done = [threading.Event(), threading.Event()]
        with ThreadPoolExecutor() as clients:
            for client, event in zip((write_objects, register), done, strict=True):
                clients.submit(client, served, round_, event)
            assert all(event.wait(60) for event in done)
            # A random time.
            threading.Event().wait(moments.uniform(0, 0.5))
            kill(served)

    served = restart()
    state = served.state()
    assert told_manifests <= set(state["manifests"])
    assert told_clusters <= {cluster["id"] for cluster in state["clusters"]}
    assert len(told_clusters) == KILLS
    s3 = s3_client(served)
    assert len(told_objects) >= KILLS
    for key, content in told_objects.items():
        assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == content


def test_query_whose_end_was_reported_does_not_run_again(
    restart: Restart, run_client: Callable[..., str]
) -> None:
    served = restart()
    run_client(
        served.environment,
        """
ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
ctx.start()
query = pl.LazyFrame({"x": [1, 2]}).remote(ctx).sink_parquet("s3://your-bucket/mine/")
assert query.await_result().n_rows_total == 2
""",
    )
    [before] = served.state()["queries"]
    kill(served)
    [after] = restart().state()["queries"]
    assert after == before
    assert after["status"] == "Success"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"cluster_size": 10_000}, "cluster_size must be at most 100"),
        ({"requirements_txt": "nowhere-at-all"}, "requirement 'nowhere-at-all' is not met"),
        ({"polars_version": "1.44.2"}, "workers run Polars"),
    ],
)
def test_cluster_that_cannot_restart_fails_and_the_others_keep_running(
    restart: Restart, tmp_path: Path, changed: dict[str, Any], expected: str
) -> None:
    served = restart()
    with rest_client(served.environment) as rest:
        lost, kept = (rest.post(f"{WORKSPACE}/compute/start", json=CLUSTER).json() for _ in "12")
        rest.post(f"{WORKSPACE}/manifest", json=CLUSTER | {"name": "large"})
    assert served.stop() == (0, "", "")
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "state" / "state.sqlite")) as file,
        file,
    ):
        rows = file.execute("SELECT key, content FROM kept WHERE key IN (?, 'large')", [lost["id"]])
        for key, content in rows.fetchall():
            each = msgspec.msgpack.decode(content)
            each["spec"] |= changed
            content = msgspec.msgpack.encode(each)
            file.execute("UPDATE kept SET content = ? WHERE key = ?", [content, key])

    served = restart()
    statuses = {cluster["id"]: cluster["status"] for cluster in served.state()["clusters"]}
    assert statuses == {lost["id"]: "Failed", kept["id"]: "Idle"}
    with rest_client(served.environment) as rest:
        cluster = rest.get(f"{WORKSPACE}/compute/{lost['id']}").json()
        assert expected in cluster["termination"]["termination_message"]
        assert rest.post(f"{WORKSPACE}/manifest/start", json={"name": "large"}).is_error == (
            "requirements_txt" not in changed  # checked when the cluster starts
        )
    code, _, errors = served.stop()
    assert code == 0
    assert f"Cluster {lost['id']} failed to restart: " in errors
    assert expected in errors


def test_object_of_any_key_survives_a_restart(restart: Restart) -> None:
    served = restart()
    s3 = s3_client(served)
    for key in KEYS:
        s3.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
    s3.delete_object(Bucket=BUCKET, Key="a/b")
    s3.put_object(Bucket=BUCKET, Key="gone", Body=b"x")
    s3.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": "gone"}]})
    kill(served)
    s3 = s3_client(restart())
    listed = {each["Key"] for each in s3.list_objects_v2(Bucket=BUCKET)["Contents"]}
    assert set(KEYS) - {"a/b"} <= listed
    assert not {"a/b", "gone"} & listed
    for key in set(KEYS) - {"a/b"}:
        assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == key.encode()


def test_no_key_leaves_the_folder(tmp_path: Path) -> None:
    objects = PersistedObjects(tmp_path, [BUCKET], "us-east-1")
    for key in ("..", "../x", "/etc/x", "a/../../x"):
        path = objects._path(BUCKET, key)
        assert path.resolve().parent == (tmp_path / BUCKET).resolve()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=90-", slice(90, None)),
        ("bytes=-5", slice(-5, None)),
        ("bytes=95-200", slice(95, None)),
        ("bytes=-200", slice(None)),
    ],
)
def test_part_of_an_object_is_read(s3: Any, asked: str, expected: slice) -> None:
    content = bytes(range(100))
    put = s3.put_object(
        Bucket=BUCKET, Key="x", Body=content, Metadata={"of": "mine"}, ContentType="text/x"
    )
    got = s3.get_object(Bucket=BUCKET, Key="x", Range=asked)
    part = content[expected]
    assert got["Body"].read() == part
    assert got["ContentLength"] == len(part)
    assert got["ContentRange"].endswith("/100")
    assert got["ETag"] == put["ETag"]
    assert got["Metadata"] == {"of": "mine"}
    assert got["ContentType"] == "text/x"


def test_part_behind_the_end_of_an_object_is_refused(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="x", Body=b"short")
    with pytest.raises(ClientError, match="InvalidRange"):
        s3.get_object(Bucket=BUCKET, Key="x", Range="bytes=100-200")


def test_object_of_parts_is_read_as_one(s3: Any) -> None:
    big = {"Bucket": BUCKET, "Key": "big"}
    upload = {**big, "UploadId": s3.create_multipart_upload(**big)["UploadId"]}
    parts = []
    for number, chunk in enumerate([b"a" * 5 * 2**20, b"b" * 10], 1):
        put = s3.upload_part(**upload, PartNumber=number, Body=chunk)
        parts.append({"PartNumber": number, "ETag": put["ETag"]})
    s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    assert s3.get_object(**big, Range="bytes=-11")["Body"].read() == b"a" + b"b" * 10


def test_policy_of_a_bucket_holds_for_what_is_on_disk(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="x", Body=b"x")
    policy = (
        '{"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Principal": "*", '
        '"Action": "s3:GetObject", "Resource": "arn:aws:s3:::your-bucket/*"}]}'
    )
    s3.put_bucket_policy(Bucket=BUCKET, Policy=policy)
    with pytest.raises(ClientError, match="Forbidden"):
        s3.get_object(Bucket=BUCKET, Key="x")


def test_missing_object_is_not_found(s3: Any) -> None:
    with pytest.raises(ClientError, match="NoSuchKey"):
        s3.get_object(Bucket=BUCKET, Key="nothing")


def test_clients_of_one_key_read_what_one_of_them_wrote(s3: Any) -> None:
    contents = [str(number).encode() * 5000 for number in range(1000)]

    def write(content: bytes) -> None:
        s3.put_object(Bucket=BUCKET, Key="shared", Body=content)
        assert s3.get_object(Bucket=BUCKET, Key="shared")["Body"].read() in contents

    with ThreadPoolExecutor(16) as clients:
        list(clients.map(write, contents))


def test_write_to_a_full_disk_changes_no_object(restart: Restart) -> None:
    served = restart()
    s3 = s3_client(served)
    old, new, other = ({"Bucket": BUCKET, "Key": key} for key in ("old", "new", "other"))
    s3.put_object(**old, Body=b"before", Metadata={"of": "mine"})
    s3.put_object(**other, Body=b"other")
    upload = old | {"UploadId": s3.create_multipart_upload(**old)["UploadId"]}
    part = s3.upload_part(**upload, PartNumber=1, Body=b"after")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    writes: list[Callable[[], object]] = [
        lambda: s3.put_object(**new, Body=b"after"),
        lambda: s3.put_object(**old, Body=b"after"),
        lambda: s3.copy_object(**old, CopySource=other),
        lambda: s3.complete_multipart_upload(**upload, MultipartUpload=parts),
    ]
    with full_disk(served.pid):
        for write in writes:
            with pytest.raises(ClientError, match="The emulator cannot store this object"):
                write()
            got = s3.get_object(**old)
            assert (got["Body"].read(), got["Metadata"]) == (b"before", {"of": "mine"})
            with pytest.raises(ClientError, match="NoSuchKey"):
                s3.get_object(**new)
    s3.complete_multipart_upload(**upload, MultipartUpload=parts)
    assert s3.get_object(**old)["Body"].read() == b"after"
    assert served.stop() == (0, "", "")


def test_large_call_on_a_full_disk_is_refused(
    restart: Restart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    served = restart()
    headers = {**VERSIONS, "authorization": f"Bearer {access_token(served.environment)}"}

    def call() -> tuple[grpc.StatusCode, str]:
        path = f"{CONTROL_PLANE}/SubmitQuery"
        return call_grpc(served.environment, path, headers, bytes(3_000_000))

    assert call()[0] is grpc.StatusCode.INVALID_ARGUMENT
    # A missing folder stands for a full disk.
    temporary.rmdir()
    status, text = call()
    assert status is grpc.StatusCode.INTERNAL
    assert text.startswith("the emulator cannot write its state (")
    assert served.stop() == (0, "", "")
