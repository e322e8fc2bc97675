"""Every public name of the client, and of its command `pc`, is answered or refused in words."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import polars as pl
import pytest

from polars_cloud_emulator.testing import RunningEmulator

ONE_EACH = "one workspace in one organization: it makes and deletes none"
NO_PLANS = "does not know POST .*/GetQueryPlans"
NO_EXPLAIN = "executes queries; it does not explain them"
NO_FLIGHT = "only supported on `ClusterContext`"
NO_CLOUD = "runs on no cloud: there is none to connect"


class Used(NamedTuple):
    """What the names are tried on."""

    pc: Any
    context: Any
    frame: Any
    query: Any
    result: Any


Call = Callable[[Used], Any]

ANSWERED: dict[str, Call] = {
    "ComputeContext.connect": lambda used: used.pc.ComputeContext.connect(
        used.context._compute_id, workspace="playground"
    ),
    "ComputeContext.get_status": lambda used: used.context.get_status(),
    "ComputeContext.list": lambda used: used.pc.ComputeContext.list("playground"),
    "ComputeContext.organization": lambda used: used.context.organization.name,
    "ComputeContext.register": lambda used: used.pc.ComputeContext(
        workspace="playground", cpus=2, memory=4
    ).register("nightly"),
    "ComputeContext.select": lambda used: used.pc.ComputeContext.select("playground"),
    "ComputeContext.show_versions": lambda used: used.context.show_versions(),
    "ComputeContext.start": lambda used: used.pc.ComputeContext(
        workspace="playground", cpus=2, memory=4
    ).start(),
    "ComputeContext.stop": lambda used: used.context.stop(),
    "ComputeContext.unregister": lambda used: register_and_unregister(used.pc),
    "ComputeContext.workspace": lambda used: used.context.workspace.name,
    "DirectQuery.await_result": lambda used: used.query.await_result(),
    "DirectQuery.cancel": lambda used: used.query.cancel(),
    "DirectQuery.get_status": lambda used: used.query.get_status(),
    "DirectQuery.await_result_async": lambda used: asyncio.run(used.query.await_result_async()),
    "DirectQuery.delete_result": lambda used: used.query.delete_result(),
    "LazyFrameRemote.await_and_scan": lambda used: used.frame.await_and_scan().collect(),
    "LazyFrameRemote.distributed": lambda used: used.frame.distributed().execute(),
    "LazyFrameRemote.execute": lambda used: used.frame.execute(),
    "LazyFrameRemote.labels": lambda used: used.frame.labels("a=b").execute(),
    "LazyFrameRemote.show": lambda used: used.frame.show(),
    "LazyFrameRemote.sink_batches": lambda used: used.frame.sink_batches(id),
    "LazyFrameRemote.with_lineage": lambda used: used.frame.with_lineage(
        job_namespace="shop", job_name="daily"
    ).execute(),
    "LazyFrameRemote.single_node": lambda used: used.frame.single_node().execute(),
    "LazyFrameRemote.sink_csv": lambda used: used.frame.sink_csv("s3://your-bucket/x/"),
    "LazyFrameRemote.sink_ipc": lambda used: used.frame.sink_ipc("s3://your-bucket/x/"),
    "LazyFrameRemote.sink_parquet": lambda used: used.frame.sink_parquet("s3://your-bucket/x/"),
    "Organization.list": lambda used: used.pc.Organization.list(),
    "Organization.load": lambda used: used.context.organization.load(),
    "QueryResult.delete": lambda used: used.result.delete(),
    "QueryResult.head": lambda used: used.result.head,
    "QueryResult.lazy": lambda used: used.result.lazy().collect(),
    "QueryResult.raise_err": lambda used: used.result.raise_err(),
    "QueryResult.stage_statistics": lambda used: used.result.stage_statistics(),
    "Workspace.aws": lambda used: used.context.workspace.aws,
    "Workspace.defaults": lambda used: used.context.workspace.defaults,
    "Workspace.is_active": lambda used: used.context.workspace.is_active(),
    "Workspace.status": lambda used: used.context.workspace.status,
    "Workspace.wait_until_active": lambda used: used.context.workspace.wait_until_active(),
    "Workspace.list": lambda used: used.pc.Workspace.list(),
    "Workspace.load": lambda used: used.context.workspace.load(),
    "Workspace.organization": lambda used: used.context.workspace.organization.name,
}
REFUSED: dict[str, tuple[Call, str]] = {
    "DirectQuery.graph": (lambda used: used.query.graph(), NO_PLANS),
    "DirectQuery.plan": (lambda used: used.query.plan(), NO_PLANS),
    "LazyFrameRemote.collect": (lambda used: used.frame.collect(), NO_FLIGHT),
    "LazyFrameRemote.collect_batches": (lambda used: used.frame.collect_batches(), NO_FLIGHT),
    "LazyFrameRemote.sink_iceberg": (
        lambda used: used.frame.sink_iceberg("shop.sales", mode="append", catalog=own_catalog()),
        "pyiceberg",
    ),
    "LazyFrameRemote.explain": (lambda used: used.frame.explain(), NO_EXPLAIN),
    "Organization.delete": (lambda used: used.context.organization.delete(), ONE_EACH),
    "Organization.setup": (lambda used: used.pc.Organization.setup("mine"), ONE_EACH),
    "QueryResult.graph": (lambda used: used.result.graph(), NO_PLANS),
    "QueryResult.plan": (lambda used: used.result.plan(), NO_PLANS),
    "Workspace.connect_provider": (
        lambda used: used.context.workspace.connect_provider(verify=False),
        NO_CLOUD,
    ),
    "Workspace.deploy": (lambda used: used.context.workspace.deploy(verify=False), NO_CLOUD),
    "Workspace.setup": (lambda used: used.pc.Workspace.setup("mine", "emulator"), ONE_EACH),
    "Workspace.create": (lambda used: used.pc.Workspace.create("mine", "emulator"), ONE_EACH),
    "Workspace.delete": (lambda used: used.context.workspace.delete(), "403"),
    "Workspace.set_default": (
        lambda used: used.context.workspace.set_default(),
        "keeps no settings of a user",
    ),
}
REFUSALS = (
    *(ModuleNotFoundError, RuntimeError, TypeError, ValueError),
    pl.exceptions.ComputeError,
)
LOCAL = {
    *(
        f"ComputeContext.{name}"
        for name in (
            "cluster_size",
            "connection_mode",
            "cpu_architectures",
            "cpus",
            "env_vars",
            "instance_type",
            "labels",
            "log_level",
            "memory",
            "polars_version",
            "storage",
        )
    ),
    *(
        f"QueryResult.{name}"
        for name in (
            "failed_stages",
            "file_type",
            "finished_stages",
            "location",
            "n_rows_total",
            "total_stages",
        )
    ),
    *("Organization.id", "Organization.name", "Workspace.id", "Workspace.name"),
}
"""Names that ask nobody."""


def own_catalog() -> Any:
    from pyiceberg.catalog.sql import SqlCatalog

    return SqlCatalog("shop", uri="sqlite:///:memory:", warehouse="s3://your-bucket/warehouse")


def register_and_unregister(pc: Any) -> None:
    context = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    context.register("weekly")
    named = pc.ComputeContext(workspace="playground", name="weekly")
    named.unregister()


@pytest.fixture
def used(pc: ModuleType, start_cluster: Callable[..., Any]) -> Used:
    context = start_cluster()
    frame = pl.LazyFrame({"x": [1, 2]}).remote(context)
    query = frame.execute(blocking=False)
    return Used(pc, context, frame, query, query.await_result())


@pytest.fixture(autouse=True)
def _person_who_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(question: str = "") -> str:
        return "1" if "Select" in question else "y"

    monkeypatch.setattr("builtins.input", answer)


def names_of(owner: type) -> set[str]:
    return {f"{owner.__name__}.{name}" for name in dir(owner) if not name.startswith("_")}


def test_table_has_every_name_that_asks_polars_cloud(pc: ModuleType) -> None:
    owners = ("ComputeContext", "DirectQuery", "LazyFrameRemote", "Organization", "QueryResult")
    names = set.union(*(names_of(getattr(pc, owner)) for owner in (*owners, "Workspace")))
    assert names == ANSWERED.keys() | REFUSED.keys() | LOCAL


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ANSWERED)
def test_name_is_answered(emulator: RunningEmulator, used: Used, name: str) -> None:
    ANSWERED[name](used)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_name_is_refused_in_words(used: Used, name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(REFUSALS, match=words):
        call(used)


def run_pc(emulator: RunningEmulator, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [Path(sys.executable).parent / "pc", *arguments],
        env=os.environ | emulator.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("workspace list", "playground"),
        ("workspace details -w playground", "playground"),
        ("organization list", "emulator"),
        ("compute start -w playground --cpus 2 --memory 4", "Starting cluster"),
        ("compute list -w playground", "Idle"),
        ("compute details -w playground --id {cluster}", "{cluster}"),
        ("compute stop -w playground --id {cluster}", ""),
    ],
)
def test_command_of_the_client_is_answered(
    emulator: RunningEmulator, start_cluster: Callable[..., Any], arguments: str, words: str
) -> None:
    cluster = str(start_cluster()._compute_id)
    ran = run_pc(emulator, *arguments.format(cluster=cluster).split())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert words.format(cluster=cluster) in ran.stdout
