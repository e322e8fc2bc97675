"""Secrets in storage options: on disk only until their query ends, and never shown."""

import contextlib
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from emulator.tests.command_line import Served
from polars_cloud_emulator.model.workspace import WORKSPACE_ID
from polars_cloud_emulator.testing import RunningEmulator, eventually

StartCluster = Callable[..., Any]

SECRET = "known-to-the-author-of-the-query-alone"
SIZES = {"small": 10, "large": 30_000}
"""Rows of a frame in the plan."""


def state_dir(emulator: RunningEmulator) -> Path:
    return Path(emulator.environment["SSL_CERT_DIR"]).parent


def holding_the_secret(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if SECRET.encode() in path.read_bytes()]


def with_the_secret(environment: Mapping[str, str]) -> dict[str, str]:
    """Return storage options for the emulator's S3, with a secret that the S3 ignores."""
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {**{name.lower(): environment[name] for name in keys}, "user_agent": SECRET}


def frame(emulator: RunningEmulator, source: str, rows: int) -> tuple[pl.LazyFrame, dict[str, str]]:
    """Return a frame that reads with the secret, and storage options for its sink."""
    options = {
        **with_the_secret(emulator.environment),
        "aws_endpoint_url": emulator.environment["AWS_ENDPOINT_URL"],
        "aws_region": "us-east-1",
    }
    scan = pl.scan_parquet(f"s3://your-bucket/{source}", storage_options=options)
    return scan.join(pl.LazyFrame({"line": range(rows)}), on="line"), options


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("end", ["success", "failure", "cancel", "stop", "cancel while it waits"])
def test_secret_of_a_query_ends_with_it(
    emulator: RunningEmulator, start_cluster: StartCluster, size: str, end: str
) -> None:
    context = start_cluster()
    if end in {"cancel", "stop", "cancel while it waits"}:
        emulator.add_fault("SubmitQuery", "query_hangs")
    if end == "cancel while it waits":
        pl.LazyFrame({"x": [1]}).remote(context).execute(blocking=False)
    source = "missing.parquet" if end == "failure" else "returns/"
    lf, options = frame(emulator, source, SIZES[size])
    query = lf.remote(context).sink_parquet("s3://your-bucket/mine/", storage_options=options)
    if end in {"success", "failure"}:
        with contextlib.suppress(FileNotFoundError):
            query.await_result()
    else:
        eventually(lambda: emulator.state()["queries"][0]["started_at"])
        assert holding_the_secret(state_dir(emulator) / "plans")
        query.cancel() if "cancel" in end else context.stop()
    assert not holding_the_secret(state_dir(emulator))
    shown = emulator.state()["queries"][-1]
    assert shown["status"] == {"success": "Success", "failure": "Failed", "stop": "Failed"}.get(
        end, "Canceled"
    )
    with httpx.Client(base_url=emulator.rest_url, trust_env=False) as browser:
        page = browser.get(f"/portal/{WORKSPACE_ID}/{shown['cluster_id']}/queries/{shown['id']}")
    assert page.status_code == 200
    if size == "large":
        assert "The plan was not stored: it is large" in page.text
    elif end == "failure":
        assert "Polars cannot explain the plan here" in page.text
    else:
        assert "Parquet SCAN [s3://your-bucket/returns/" in page.text
    for text in (page.text, str(emulator.state()), str(emulator.journal())):
        assert SECRET not in text


def test_secret_of_a_query_ends_with_it_after_a_restart(
    serve: Callable[..., Served], run_client: Callable[..., str], tmp_path: Path
) -> None:
    options = ("--port-base", 0, "--state-dir", tmp_path / "state")
    served = serve(*options)
    served.add_fault("SubmitQuery", "query_hangs")
    run_client(
        served.environment,
        f"""
ctx = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
ctx.start()
options = {with_the_secret(served.environment)}
scan = pl.scan_parquet("s3://your-bucket/returns/", storage_options=options)
scan.remote(ctx).sink_parquet("s3://your-bucket/mine/")
""",
    )
    eventually(lambda: served.state()["queries"][0]["started_at"])
    served.process.send_signal(signal.SIGKILL)
    served.process.wait(30)
    assert holding_the_secret(tmp_path / "state" / "plans")
    served = serve(*options)
    eventually(lambda: served.state()["queries"][0]["status"] == "Success")
    eventually(lambda: not holding_the_secret(tmp_path / "state"))


def test_secret_of_a_refused_query_is_not_stored(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    lf, _ = frame(emulator, "returns/", 1)
    lf.remote(context).execute()
    emulator.call("POST", f"compute/{context._compute_id}/stop")
    with pytest.raises(RuntimeError, match="accepts no queries"):
        lf.remote(context).execute()
    assert not holding_the_secret(state_dir(emulator))
