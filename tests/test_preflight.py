"""`preflight.py` and its DAG, and the checks of other DAGs before a cluster starts."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import boto3
import polars as pl
import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

import polars_remote
from include import preflight
from include.shop import get_schemas
from local_airflow import ROOT
from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote import ensure_manifest, use_cluster
from polars_remote.cloud import session
from polars_remote.compat.versions import AirflowFailException
from polars_remote.errors import ClusterNotStartedError
from tests.buckets import create_bucket_elsewhere, create_bucket_of_others
from tests.eight_dags import KEPT
from tests.manifest_body import MANIFEST_BODY
from tests.observed import calls, cluster_statuses, variables
from tests.tries import StartTry

FOLDER = ROOT / "plugins" / "polars_remote"
CLUSTER = {"name": "airflow-preflight", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}
LIMIT = timedelta(minutes=20)
BILLED = "one node (2 CPUs and 4 GB) is billed for a few minutes, at most 30"
SHOP = "s3://my-bucket/shop"
FILE = "s3://your-bucket/results/preflight.parquet"

Set = Callable[..., None]


@pytest.fixture
def set_settings(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Set settings as if their variables had these values."""

    def set_settings(**values: str) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith(("include.", "polars_remote.")):
                for setting, value in values.items():
                    if hasattr(module, setting):
                        monkeypatch.setattr(module, setting, value)

    return set_settings


@pytest.fixture
def on_the_service(emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the emulator as the real service, and its account as a user's."""
    place = emulator.environment["POLARS_CLOUD_DOMAIN"].removeprefix("emulator")
    monkeypatch.setenv("POLARS_CLOUD_DOMAIN", f"service{place}")
    monkeypatch.setattr(session, "EMULATOR", "another-emulator")


@pytest.fixture
def in_task(emulator: RunningEmulator, start_try: StartTry) -> Iterator[None]:
    """A task that has not logged in; the test is its body."""
    with start_try(scope=False):
        yield


@pytest.fixture
def load(airflow_db: None) -> Callable[[str], DAG]:
    """Parse a DAG file with the current settings."""

    def load(dag_id: str) -> DAG:
        dag: DAG = DagBag(ROOT / "dags" / f"{dag_id}.py").dags[dag_id]
        for task in dag.tasks:
            task.retries = 0
        return dag

    return load


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines that the preflight has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "include.preflight"]


def failure(caplog: pytest.LogCaptureFixture) -> str:
    """Return the line of the failed step, which is the last one."""
    *passed, last = lines(caplog)
    assert all(": FAILED: " not in line for line in passed)
    return last


def assert_nothing_was_started(emulator: RunningEmulator) -> None:
    assert emulator.state()["clusters"] == []
    assert calls(emulator, "start") == 0


def connection(**values: str | None) -> str:
    return json.dumps({"conn_type": "http", **values})


def tables_checked() -> str:
    """Line of the step *Tables* for the sample data, which has a file for each month."""
    month = pl.col("date").dt.truncate("1mo").n_unique()
    files = {
        table: pl.read_parquet(f"s3://your-bucket/{table}/").select(month).item()
        for table in get_schemas()
    }
    checked = ", ".join(f"{table} ({number} files)" for table, number in files.items())
    return f"{checked} have the types of their schemas"


# Without a cluster


@pytest.mark.usefixtures("in_task")
def test_each_step_logs_its_finding_in_a_line(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    from airflow import __version__ as airflow
    from polars import __version__ as polars
    from polars_cloud import __version__ as client

    preflight.check_setup()
    python = platform.python_version()
    assert lines(caplog) == [
        f"Airflow: ok: Airflow {airflow}, Python {python}",
        f"Client: ok: polars-cloud {client}, polars {polars}",
        f"Library: ok: {FOLDER} ({polars_remote.__version__})",
        "Data: ok: s3://your-bucket",
        f"Tables: ok: {tables_checked()}",
        "Connection: ok: polars_cloud has type http, login polars-cloud-emulator and a password",
        "Login: ok: accepted by the emulator",
        "Workspace: ok: playground",
        "Manifest: ok: airflow-production does not exist yet: "
        "the first task that uses it registers it",
    ]
    assert emulator.environment["POLARS_CLOUD_CLIENT_SECRET"] not in caplog.text
    assert_nothing_was_started(emulator)
    assert emulator.state()["manifests"] == []


@pytest.mark.usefixtures("in_task")
def test_two_copies_of_the_library_are_refused_with_both_paths_and_versions(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "polars_remote"
    other.mkdir()
    (other / "__init__.py").write_text('__version__ = "0.9.0"\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AirflowFailException):
        preflight.check_setup()
    assert failure(caplog) == (
        f"Library: FAILED: polars_remote is imported from {FOLDER} ({polars_remote.__version__}), "
        f"which hides {other} (0.9.0): delete all but one"
    )


@pytest.mark.usefixtures("in_task")
def test_untested_releases_are_named_and_accepted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "NEWEST_TESTED", {"Airflow": "3.0", "polars-cloud": "0.11"})
    preflight.check_setup()
    airflow, client, *_ = lines(caplog)
    assert "(tested up to 3.0)" in airflow
    assert "(tested up to 0.11)" in client


@pytest.mark.usefixtures("in_task")
def test_an_old_python_is_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "OLDEST_PYTHON", "4.0")
    with pytest.raises(AirflowFailException):
        preflight.check_setup()
    assert failure(caplog) == (
        f"Airflow: FAILED: This worker runs Python {platform.python_version()}: the DAGs need 4.0 "
        "or newer"
    )


@pytest.mark.usefixtures("in_task")
def test_a_polars_that_the_client_does_not_work_with_is_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "polars-1.44.2.dist-info").mkdir()
    (tmp_path / "polars-1.44.2.dist-info" / "METADATA").write_text("Name: polars\nVersion: 1.44.2")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AirflowFailException):
        preflight.check_setup()
    assert failure(caplog).startswith(
        "Client: FAILED: polars 1.44.2 is installed, but polars-cloud 0.12.0 needs polars["
    )
    assert failure(caplog).endswith("==2.0.0: pip install polars-cloud==0.12.0")


@pytest.mark.usefixtures("in_task")
def test_a_worker_without_the_client_is_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(AirflowFailException):
            preflight.check_setup()
    assert failure(caplog) == (
        "Client: FAILED: polars-cloud is not installed on this worker: install requirements.txt "
        "there"
    )


def test_a_polars_with_32_bit_row_numbers_is_refused() -> None:
    look = "from include import preflight; preflight.check_client()"
    ran = subprocess.run(
        [sys.executable, "-c", look],
        cwd=ROOT,
        env={**os.environ, "POLARS_PREFER_PKG": "32"},
        capture_output=True,
        text=True,
    )
    assert "runs with 32-bit row numbers, which polars-cloud refuses" in ran.stderr
    assert "unset POLARS_FORCE_PKG and POLARS_PREFER_PKG" in ran.stderr


BAD_DATA = {
    "": "is '', which has no scheme",
    "my-bucket/shop": "is 'my-bucket/shop', which has no scheme",
    "/data": "is '/data', which has no scheme",
    "s3:": "is 's3:', which has no bucket",
    "file:///data": "is 'file:///data', which has no bucket",
}


@pytest.mark.usefixtures("in_task")
@pytest.mark.parametrize("data", BAD_DATA)
def test_a_data_location_that_is_no_bucket_is_refused(
    caplog: pytest.LogCaptureFixture, set_settings: Set, data: str
) -> None:
    set_settings(DATA=data)
    with pytest.raises(AirflowFailException):
        preflight.check_setup()
    assert failure(caplog) == (
        f"Data: FAILED: POLARS_CLOUD_DATA {BAD_DATA[data]}. Set it to the URI of the folder "
        f"with your tables, such as {SHOP}"
    )


@pytest.mark.usefixtures("in_task", "on_the_service")
def test_the_default_data_location_is_refused_on_the_service(
    caplog: pytest.LogCaptureFixture, set_settings: Set
) -> None:
    with pytest.raises(AirflowFailException):
        preflight.check_setup()
    assert "POLARS_CLOUD_DATA is not set, and its default" in failure(caplog)
    boto3.client("s3").create_bucket(Bucket="my-bucket")
    for table in get_schemas():
        pl.read_parquet(f"s3://your-bucket/{table}/").write_parquet(f"{SHOP}/{table}/all.parquet")
    set_settings(DATA=SHOP)
    preflight.check_setup()
    assert f"Data: ok: {SHOP}" in lines(caplog)
    assert "Login: ok: accepted by Polars Cloud" in lines(caplog)


@pytest.mark.usefixtures("in_task")
def test_a_missing_bucket_is_reported_without_a_cluster(
    caplog: pytest.LogCaptureFixture, set_settings: Set
) -> None:
    set_settings(DATA="s3://nobodys-bucket/shop")
    with pytest.raises(OSError, match="NoSuchBucket"):
        preflight.check_setup()
    assert failure(caplog).startswith("Tables: FAILED: The bucket s3://nobodys-bucket does not exi")


@pytest.mark.usefixtures("in_task")
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "is missing"),
        (connection(password="a secret"), "has no login"),
        (connection(login="polars-cloud-emulator"), "has no password"),
        (connection(login="an-account", password="a secret"), "was not used: its login is an"),
    ],
)
def test_a_connection_of_the_wrong_shape_is_refused(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    value: str | None,
    problem: str,
) -> None:
    monkeypatch.delenv("AIRFLOW_CONN_POLARS_CLOUD")
    if value:
        monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", value)
    with pytest.raises(AirflowFailException):
        preflight.check_setup()
    assert f"Connection: FAILED: The Airflow Connection 'polars_cloud' {problem}" in failure(caplog)
    assert "a secret" not in caplog.text


@pytest.mark.usefixtures("in_task")
def test_a_refused_login_is_reported_without_the_secret(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = connection(login="polars-cloud-emulator", password="a secret")
    monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", wrong)
    with pytest.raises(AirflowFailException):
        preflight.check_setup()
    assert "Login: FAILED: The Airflow Connection 'polars_cloud' was refused" in failure(caplog)
    assert "login = client ID and password = client secret" in failure(caplog)
    assert "a secret" not in caplog.text


@pytest.mark.usefixtures("in_task", "short_outages")
def test_an_outage_while_logging_in_is_reported_as_one(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.add_fault("GET user/me", "http_error", status=503, times=1000)
    with pytest.raises(ConnectionError):
        preflight.check_setup()
    assert "Login: FAILED: Polars Cloud could not be reached" in failure(caplog)


@pytest.mark.usefixtures("in_task")
@pytest.mark.parametrize("workspace", ["nowhere", "play"])
def test_an_unknown_workspace_is_refused_with_those_that_there_are(
    caplog: pytest.LogCaptureFixture, set_settings: Set, workspace: str
) -> None:
    set_settings(WORKSPACE=workspace)
    with pytest.raises(AirflowFailException):
        preflight.check_setup()
    assert failure(caplog) == (
        f"Workspace: FAILED: Workspace '{workspace}' does not exist. Set POLARS_CLOUD_WORKSPACE to "
        "a workspace of this account: playground"
    )


@pytest.mark.usefixtures("in_task")
def test_an_empty_manifest_name_is_refused(
    caplog: pytest.LogCaptureFixture, set_settings: Set
) -> None:
    set_settings(MANIFEST="")
    with pytest.raises(AirflowFailException):
        preflight.check_setup()
    assert failure(caplog).startswith("Manifest: FAILED: POLARS_CLOUD_MANIFEST is empty")


@pytest.mark.usefixtures("ti")
def test_a_manifest_is_reported_with_its_versions(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture, pc: ModuleType
) -> None:
    ensure_manifest({**CLUSTER, "name": "airflow-production"})
    preflight.check_setup()
    versions = f"polars {pl.__version__}, Python {platform.python_version()}"
    expected = f"Manifest: ok: airflow-production fits this worker: {versions}"
    assert lines(caplog)[-1] == expected

    old = {**MANIFEST_BODY, "name": "airflow-production", "polars_version": "1.44.2"}
    emulator.call("DELETE", "manifest?name=airflow-production")
    emulator.call("POST", "manifest", old)
    preflight.check_setup()
    assert "uses airflow-production registers it again: " in lines(caplog)[-1]
    assert "specified in manifest (1.44.2)" in lines(caplog)[-1]


# With a cluster


@pytest.mark.usefixtures("ti", "pc")
def test_a_row_is_written_and_read_and_the_cluster_seen_to_be_stopped(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    preflight.check_cluster(CLUSTER, LIMIT)
    [cluster] = emulator.state()["clusters"]
    assert lines(caplog) == [
        f"Cost: from now on {BILLED}",
        f"Start: ok: cluster {cluster['id']} is running",
        f"Write: ok: a row to {FILE}",
        "Read: ok: the same row",
        f"Tables: ok: {tables_checked()}",
        f"Stop: ok: cluster {cluster['id']} has stopped",
    ]
    assert (cluster["status"], cluster["cluster_size"]) == ("Stopped", 1)
    of_the_row, of_the_tables = 2, 3 * 3
    assert len(emulator.state()["queries"]) == of_the_row + of_the_tables


@pytest.mark.usefixtures("ti", "pc")
def test_an_unknown_instance_type_is_refused_before_anything_runs(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = {"name": "airflow-preflight", "instance_type": "m5.lrge", "idle_timeout_mins": 10}
    with pytest.raises(ValueError, match="does not exist"):
        preflight.check_cluster(cluster, LIMIT)
    assert failure(caplog).startswith("Start: FAILED: ")
    assert "instance type 'm5.lrge' does not exist" in failure(caplog)
    assert_nothing_was_started(emulator)


@pytest.mark.usefixtures("ti", "pc")
def test_a_cluster_that_does_not_start_is_reported_with_its_reason(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.add_fault("POST manifest/start", "startup_fails", message="no machines left")
    with pytest.raises(ClusterNotStartedError):
        preflight.check_cluster(CLUSTER, LIMIT)
    assert failure(caplog).startswith("Start: FAILED: Cluster ")
    assert failure(caplog).endswith("did not start: no machines left")
    assert cluster_statuses(emulator) == ["Failed"]


def leave_out(name: str) -> None:
    """Do not create this bucket."""


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (leave_out, "The bucket {} does not exist: correct the URI, or create the bucket"),
        (create_bucket_of_others, "The cluster may not use {}: give the workspace's role (polars-"),
        (create_bucket_elsewhere, "The bucket {} is not in the cluster's region"),
    ],
)
def test_a_bucket_that_denies_access_is_reported_with_advice_and_no_cluster_is_left(
    emulator: RunningEmulator,
    caplog: pytest.LogCaptureFixture,
    set_settings: Set,
    make: Callable[[str], None],
    advice: str,
) -> None:
    bucket = f"refusing-{make.__name__.replace('_', '-')}"
    make(bucket)
    set_settings(DATA=f"s3://{bucket}/shop")
    with pytest.raises(OSError, match="object-store error"):
        preflight.check_cluster(CLUSTER, LIMIT)
    assert failure(caplog).startswith(f"Write: FAILED: {advice.format(f's3://{bucket}')}")
    assert "object-store error" in failure(caplog)
    assert "\n" not in failure(caplog)
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti", "pc")
def test_a_row_that_cannot_be_read_back_fails_and_no_cluster_is_left(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.add_fault("SubmitQuery", "query_fails", nth=2, error="PermissionError: no")
    with pytest.raises(PermissionError):
        preflight.check_cluster(CLUSTER, LIMIT)
    assert failure(caplog) == "Read: FAILED: no"
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("ti", "pc")
def test_another_row_than_the_one_that_was_written_fails(
    emulator: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    def overwrite() -> None:
        eventually(lambda: len(emulator.state()["queries"]) == 2)
        pl.DataFrame({"token": ["another"]}).write_parquet(FILE)
        emulator.advance_clock(timedelta(minutes=1))

    emulator.add_fault("SubmitQuery", "query_waits", nth=2, seconds=60)
    with ThreadPoolExecutor() as background:
        overwritten = background.submit(overwrite)
        with pytest.raises(RuntimeError):
            preflight.check_cluster(CLUSTER, LIMIT)
        overwritten.result()
    assert f"Read: FAILED: {FILE} does not contain the row that was just written" in failure(caplog)
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.usefixtures("pc")
def test_a_cluster_that_does_not_stop_in_time_is_reported(
    emulator: RunningEmulator,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    start_try: StartTry,
) -> None:
    monkeypatch.setattr(preflight, "STOP_SECONDS", 0.0)
    with start_try(run_id="manual__2"), use_cluster(CLUSTER):
        with start_try(raises=TimeoutError):
            preflight.check_cluster(CLUSTER, LIMIT)
        assert "is IDLE 0 s after the request to stop: stop it in Polars Cloud" in failure(caplog)
    assert cluster_statuses(emulator) == ["Stopped"]


# The DAG


def run_states(dag: DAG, **conf: bool) -> dict[str, str]:
    """Run the DAG; return the states of its tasks and of the run, by id."""
    run = dag.test(run_conf=conf)
    states = {ti.task_id: ti.state for ti in run.get_task_instances()}
    return {**states, dag.dag_id: run.state}


def test_nothing_is_started_unless_it_is_asked_for(
    emulator: RunningEmulator,
    load: Callable[[str], DAG],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    dag = load("preflight")
    assert run_states(dag) == {
        "check_settings": "success",
        "try_cluster": "skipped",
        "preflight": "success",
    }
    assert len(lines(caplog)) == 9
    assert_nothing_was_started(emulator)
    assert f"Nothing was started, and nothing is billed. With the parameter spend, {BILLED}" in (
        capfd.readouterr().out
    )


def test_with_spend_the_cluster_is_tried_and_stopped(
    emulator: RunningEmulator, load: Callable[[str], DAG], caplog: pytest.LogCaptureFixture
) -> None:
    dag = load("preflight")
    assert dag.params.get_param("spend").description == BILLED
    assert run_states(dag, spend=True) == {
        "check_settings": "success",
        "try_cluster": "success",
        "preflight": "success",
    }
    assert f"Cost: from now on {BILLED}" in lines(caplog)
    assert lines(caplog)[-1].startswith("Stop: ok: ")
    assert cluster_statuses(emulator) == ["Stopped"]
    assert emulator.state()["unmatched"] == []


def test_what_is_found_fails_the_run_before_a_cluster_is_started(
    emulator: RunningEmulator, load: Callable[[str], DAG], set_settings: Set
) -> None:
    dag = load("preflight")
    set_settings(WORKSPACE="nowhere")
    assert run_states(dag, spend=True) == {
        "check_settings": "failed",
        "try_cluster": "upstream_failed",
        "preflight": "failed",
    }
    assert_nothing_was_started(emulator)


def test_a_failure_with_the_cluster_fails_the_run_and_leaves_no_cluster(
    emulator: RunningEmulator, load: Callable[[str], DAG], set_settings: Set
) -> None:
    dag = load("preflight")
    emulator.add_fault("SubmitQuery", "query_fails", error="PermissionError: no")
    states = run_states(dag, spend=True)
    assert (states["try_cluster"], states["preflight"]) == ("failed", "failed")
    assert cluster_statuses(emulator) == ["Stopped"]


# The other DAGs


MISTAKES = {
    "an unknown workspace": ({"WORKSPACE": "nowhere"}, "'nowhere' does not exist. Set POLARS_"),
    "no data location": ({"DATA": ""}, "POLARS_CLOUD_DATA is '', which has no scheme"),
    "no scheme": ({"DATA": "my-bucket"}, "POLARS_CLOUD_DATA is 'my-bucket', which has no scheme"),
    "no bucket": ({"DATA": "s3:"}, "POLARS_CLOUD_DATA is 's3:', which has no bucket"),
}


@pytest.mark.parametrize("dag_id", ["complete_pipeline", "single_query"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_a_dag_before_a_cluster_is_started_and_names_the_variable(
    emulator: RunningEmulator,
    load: Callable[[str], DAG],
    set_settings: Set,
    capfd: pytest.CaptureFixture[str],
    mistake: str,
    dag_id: str,
) -> None:
    settings, sentence = MISTAKES[mistake]
    set_settings(**settings)
    assert run_states(load(dag_id))[dag_id] == "failed"
    assert sentence in capfd.readouterr().out
    assert_nothing_was_started(emulator)
    assert variables() == []


@pytest.mark.usefixtures("on_the_service")
@pytest.mark.parametrize("dag_id", sorted(KEPT))
def test_a_dag_that_is_to_use_the_emulators_bucket_on_the_service_starts_no_cluster(
    emulator: RunningEmulator,
    load: Callable[[str], DAG],
    capfd: pytest.CaptureFixture[str],
    dag_id: str,
) -> None:
    assert run_states(load(dag_id))[dag_id] == "failed"
    assert "POLARS_CLOUD_DATA is not set, and its default" in capfd.readouterr().out
    assert_nothing_was_started(emulator)


@pytest.mark.usefixtures("on_the_service", "pc")
def test_a_dag_that_knows_its_uris_from_elsewhere_needs_no_data_location(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    with start_try(), use_cluster(CLUSTER) as ctx:
        pl.LazyFrame({"number": [1]}).remote(ctx).single_node().execute()
    assert cluster_statuses(emulator) == ["Stopped"]


@pytest.mark.dag("complete_pipeline")
def test_a_dag_that_meets_a_missing_bucket_names_the_variable_and_leaves_no_cluster(
    emulator: RunningEmulator,
    load: Callable[[str], DAG],
    set_settings: Set,
    capfd: pytest.CaptureFixture[str],
) -> None:
    set_settings(DATA="s3://nobodys-bucket/shop")
    assert run_states(load("complete_pipeline"))["complete_pipeline"] == "failed"
    log = capfd.readouterr().out
    assert (
        "The bucket s3://nobodys-bucket does not exist: correct the URI, or create the bucket"
        in log
    )
    assert "it has expired" not in log
    assert cluster_statuses(emulator) == ["Stopped"]
