"""An on-premises emulator: one cluster, and no control plane."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import polars as pl
import pytest

from polars_cloud_emulator.testing import RunningEmulator, running_emulator


@pytest.fixture(scope="module")
def running_on_premises() -> Iterator[RunningEmulator]:
    with running_emulator(on_premises=True) as emulator:
        yield emulator


@pytest.fixture
def on_premises(running_on_premises: RunningEmulator) -> Iterator[RunningEmulator]:
    yield running_on_premises
    running_on_premises.reset()


def connect(pc: ModuleType, emulator: RunningEmulator, **options: Any) -> Any:
    extra = json.loads(emulator.environment["AIRFLOW_CONN_POLARS_CLOUD"])["extra"]
    access = {
        "tls_options": pc.TLSOptions(ca_cert=extra["ca_cert"].encode()),
        "extra_headers": extra["headers"],
    }
    return pc.ClusterContext(emulator.environment["POLARS_CLUSTER_URI"], **(access | options))


def test_cluster_on_premises_runs_queries_of_whoever_sends_its_header(
    pc: ModuleType, on_premises: RunningEmulator
) -> None:
    result = pl.LazyFrame({"x": [1, 2]}).remote(connect(pc, on_premises)).execute()
    assert result.n_rows_total == 2
    stranger = connect(pc, on_premises, extra_headers={"authorization": "Bearer stranger"})
    with pytest.raises(RuntimeError, match="valid authentication credentials"):
        pl.LazyFrame({"x": [1]}).remote(stranger).execute()
    assert len(on_premises.state()["queries"]) == 1


def test_cluster_on_premises_has_a_certificate_authority_of_its_own(
    pc: ModuleType, on_premises: RunningEmulator, emulator: RunningEmulator
) -> None:
    authority = on_premises.environment["AIRFLOW_CONN_POLARS_CLOUD"]
    [of_the_cloud] = Path(emulator.environment["SSL_CERT_DIR"]).iterdir()
    assert json.loads(authority)["extra"]["ca_cert"] != of_the_cloud.read_text()


def test_cluster_on_premises_is_there_again_after_a_reset(on_premises: RunningEmulator) -> None:
    on_premises.reset()
    [cluster] = on_premises.state()["clusters"]
    assert cluster["stopped_at"] is None


def test_emulator_on_premises_has_no_control_plane(on_premises: RunningEmulator) -> None:
    with pytest.raises(ValueError, match="does not support"):
        on_premises.call("GET", "compute")
    assert on_premises.state()["unmatched"]


def test_job_and_parent_of_a_query_are_seen_in_the_state(
    pc: ModuleType, on_premises: RunningEmulator
) -> None:
    run_id = uuid4()
    remote: Any = pl.LazyFrame({"x": [1]}).remote(connect(pc, on_premises))
    remote.with_lineage(
        job_namespace="shop",
        job_name="report.query",
        parent_run_id=run_id,
        parent_job_namespace="shop",
        parent_job_name="report",
    ).execute()
    [query] = on_premises.state()["queries"]
    assert query["lineage"]["job_name"] == "report.query"
    assert query["lineage"]["parent_run_id"] == str(run_id)
