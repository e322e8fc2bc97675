"""`cloud/manifests.py`: a manifest is registered as in the code, for this worker's versions."""

import io
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from polars_cloud_emulator.testing import RunningEmulator
from polars_remote import ensure_manifest, use_cluster
from polars_remote.errors import ClusterRefusedError
from polars_remote.ownership.end import end_orphans
from tests.manifest_body import MANIFEST_BODY
from tests.observed import cluster_statuses, entries
from tests.tries import StartTry, Supervisor, kill

CLUSTER = {"name": "shop", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}
ONE_ROW = pl.LazyFrame({"x": [1]})
LARGER = {**CLUSTER, "cpus": 8, "memory": 16, "cluster_size": 4}
OTHER_VERSIONS = [
    {"polars_version": "1.41.2"},
    {"python_version": {"major": 3, "minor": 9, "patch": 1}},
]


def registered(emulator: RunningEmulator) -> dict[str, Any]:
    manifest: dict[str, Any] = emulator.call("GET", "manifest/find?name=shop")
    return manifest


def calls(emulator: RunningEmulator, method: str) -> int:
    return sum(
        call["path"].endswith("/manifest") and call["method"] == method
        for call in emulator.journal()
    )


@pytest.mark.usefixtures("ti")
def test_an_absent_manifest_is_registered(pc: ModuleType, emulator: RunningEmulator) -> None:
    ensure_manifest(CLUSTER)
    assert registered(emulator)["idle_timeout_mins"] == 10
    assert pc.ComputeContext(name="shop", workspace="playground").cpus == 2


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": 3, "storage": 50, "log_level": "debug", "env_vars": {"TZ": "UTC"}},
        {"requirements": b"numpy==2.3.5\n"},
        {"cpu_architectures": ["arm64"]},
    ],
    ids=["nothing", "sizes", "requirements", "architecture"],
)
def test_a_fitting_manifest_is_left_alone(
    emulator: RunningEmulator, options: dict[str, Any]
) -> None:
    cluster = {**CLUSTER, **options}
    ensure_manifest(cluster)
    before = registered(emulator)
    ensure_manifest(cluster)
    assert registered(emulator)["id"] == before["id"]
    assert calls(emulator, "POST") == 1


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize("drift", OTHER_VERSIONS, ids=["polars", "python"])
def test_a_manifest_of_other_versions_is_registered_again(
    emulator: RunningEmulator, drift: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    emulator.call("POST", "manifest", {**MANIFEST_BODY, **drift, "name": "shop"})
    ensure_manifest(CLUSTER)
    healed = registered(emulator)
    assert healed["polars_version"] == pl.__version__
    assert healed["python_version"] == platform.python_version()
    assert "Registering manifest shop again" in caplog.text


@pytest.mark.usefixtures("ti", "pc")
def test_a_manifest_in_proxy_mode_is_registered_again_where_the_code_asks_for_direct(
    emulator: RunningEmulator,
) -> None:
    emulator.call("POST", "manifest", {**MANIFEST_BODY, "mode": "Proxy", "name": "shop"})
    with use_cluster({**CLUSTER, "connection_mode": "direct"}) as ctx:
        ONE_ROW.remote(ctx).execute()
    assert registered(emulator)["mode"] == "Direct"


# A specification that has changed


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"cpus": 8}, "cpus 2 → 8"),
        ({"memory": 16}, "memory 4 → 16"),
        ({"cluster_size": 4}, "cluster_size 1 → 4"),
        ({"idle_timeout_mins": 30}, "idle_timeout_mins 10 → 30"),
        ({"env_vars": {"TZ": "UTC"}}, "env_vars {} → {'TZ': 'UTC'}"),
        ({"requirements": b"numpy==2.3.5\n"}, "requirements None → numpy==2.3.5"),
        ({"cpus": 8, "cluster_size": 4}, "cpus 2 → 8, cluster_size 1 → 4"),
    ],
)
def test_a_changed_specification_is_applied_and_logged(
    emulator: RunningEmulator,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    changes: str,
) -> None:
    ensure_manifest(CLUSTER)
    ensure_manifest({**CLUSTER, **options})
    assert f"Changing manifest shop: {changes}" in caplog.text
    assert calls(emulator, "POST") == 2
    caplog.clear()
    ensure_manifest({**CLUSTER, **options})
    assert caplog.text == ""
    assert calls(emulator, "POST") == 2


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize("stop", [True, False])
def test_a_changed_specification_is_what_the_next_start_starts(
    emulator: RunningEmulator, stop: bool
) -> None:
    for cluster in (CLUSTER, LARGER):
        with use_cluster(cluster, stop=stop) as ctx:
            ONE_ROW.remote(ctx).execute()
    assert [cluster["cluster_size"] for cluster in emulator.state()["clusters"]] == [1, 4]


def test_a_cluster_that_is_in_use_keeps_its_specification(
    pc: ModuleType,
    emulator: RunningEmulator,
    start_try: StartTry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER) as ctx:
            ONE_ROW.remote(ctx).execute()
            yield

    kill(body, task_id="other")
    with start_try():
        ensure_manifest(LARGER)
    assert "is not changed while cluster" in caplog.text
    assert "the next start applies: cpus 2 → 8, memory 4 → 16" in caplog.text
    assert cluster_statuses(emulator) == ["Idle"]
    assert registered(emulator)["req_cpu_cores"] == 2


@pytest.mark.usefixtures("ti")
def test_a_cluster_on_which_a_query_runs_keeps_its_specification(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    ensure_manifest(CLUSTER)
    ctx = pc.ComputeContext(workspace="playground", name="shop")
    ctx.start()
    emulator.add_fault("SubmitQuery", "query_hangs")
    ONE_ROW.remote(ctx).execute(blocking=False)
    ensure_manifest(LARGER)
    assert cluster_statuses(emulator) == ["Running"]
    assert registered(emulator)["req_cpu_cores"] == 2


def test_an_idle_cluster_that_nobody_uses_makes_way_for_another_specification(
    pc: ModuleType, emulator: RunningEmulator, start_try: StartTry, supervisor: Supervisor
) -> None:
    def body() -> Iterator[None]:
        with use_cluster(CLUSTER) as ctx:
            ONE_ROW.remote(ctx).execute()
            yield

    kill(body, task_id="killed")
    supervisor.states["manual__1"]["killed"] = "failed"
    with start_try():
        ensure_manifest(LARGER)
    assert cluster_statuses(emulator) == ["Stopped"]
    assert registered(emulator)["req_cpu_cores"] == 8
    assert end_orphans() == []
    assert entries(supervisor, "cluster") == []


# Outages


@pytest.mark.usefixtures("ti", "pc")
@pytest.mark.parametrize("operation", ["GET manifest/find", "POST manifest", "DELETE manifest"])
@pytest.mark.parametrize(
    "fault", [{"kind": "http_error", "status": 503}, {"kind": "answer_lost"}], ids=["503", "lost"]
)
def test_an_outage_is_survived(
    emulator: RunningEmulator, operation: str, fault: dict[str, Any]
) -> None:
    emulator.add_fault(operation, **fault)
    for cluster in (CLUSTER, LARGER):
        ensure_manifest(cluster)
    assert registered(emulator)["req_cpu_cores"] == 8
    assert emulator.state()["faults"] == []


@pytest.mark.usefixtures("ti", "pc")
def test_registering_at_the_same_time_is_no_error(emulator: RunningEmulator) -> None:
    with ThreadPoolExecutor() as tasks:
        for done in [tasks.submit(ensure_manifest, CLUSTER) for _ in range(4)]:
            done.result()
    assert registered(emulator)["name"] == "shop"
    assert calls(emulator, "DELETE") == 0


@pytest.mark.usefixtures("ti", "pc")
def test_changing_at_the_same_time_is_no_error(emulator: RunningEmulator) -> None:
    ensure_manifest(CLUSTER)
    with ThreadPoolExecutor() as tasks:
        for done in [tasks.submit(ensure_manifest, LARGER) for _ in range(4)]:
            done.result()
    assert registered(emulator)["req_cpu_cores"] == 8


@pytest.mark.usefixtures("ti", "pc")
def test_a_manifest_that_another_task_has_just_removed_is_registered(
    emulator: RunningEmulator,
) -> None:
    # Another task deletes the manifest after this task has registered it.
    emulator.add_fault("POST manifest", "http_error", status=409)
    ensure_manifest(CLUSTER)
    assert registered(emulator)["name"] == "shop"


@pytest.mark.usefixtures("ti", "pc")
def test_a_refused_spec_is_an_error_in_the_words_of_polars_cloud() -> None:
    with pytest.raises(ValueError, match="idle_timeout_mins must be at least 10"):
        ensure_manifest({**CLUSTER, "idle_timeout_mins": 5})


@pytest.mark.usefixtures("ti", "pc")
def test_a_misspelled_option_is_an_error_that_names_it() -> None:
    with pytest.raises(ClusterRefusedError, match="memry"):
        ensure_manifest({"name": "shop", "cpus": 2, "memry": 4})


@pytest.mark.usefixtures("ti", "pc")
def test_requirements_may_be_a_file_object() -> None:
    for _ in range(2):
        ensure_manifest({**CLUSTER, "requirements": io.BytesIO(b"numpy==2.3.5\n")})
