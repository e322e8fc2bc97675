"""Every public name of the client, and of its command `pc`, works or is refused with a clear error.

A name that a newer client adds has no row in these tables, so the test of its owner fails.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import polars as pl
import pytest

from polars_cloud_emulator.testing import RunningEmulator

ONE_EACH = "exactly one workspace in one organization, which cannot be changed"
NO_ACCOUNTS = "use the emulator's POST /_emulator/service-accounts"
NO_CLOUD = "does not run on AWS, so a workspace cannot be connected to it"
NO_DEFAULTS = "stores no cluster defaults; set the cluster's cpus and memory instead"
NO_FLIGHT = "only supported on `ClusterContext`"
NO_MACHINES = "workers share one machine, so there are no nodes to list"
NO_PHYSICAL_PLAN = "no physical plan, because one worker runs the whole query"
NO_USER = "stores no user settings; name the workspace instead"

LINES = pl.LazyFrame({"x": [1, 2]})
SINKS = "s3://your-bucket/names/"


class Used(NamedTuple):
    """Objects of the client on which the names are called."""

    environment: Mapping[str, str]
    pc: Any
    context: Any
    frame: Any
    query: Any
    result: Any

    @property
    def workspace(self) -> UUID:
        workspace: UUID = self.context.workspace.id
        return workspace

    @property
    def api(self) -> Any:
        from polars_cloud import constants

        return constants.API_CLIENT

    @property
    def aws(self) -> Any:
        return self.pc.WorkspaceProviderAWS(self.workspace)

    @property
    def scheduler(self) -> Any:
        return self.context._get_direct_client()

    @property
    def proxy_query(self) -> Any:
        return self.pc.ProxyQuery(self.query._query_id, self.workspace)

    def new_context(self, **options: Any) -> Any:
        return self.pc.ComputeContext(workspace="playground", cpus=2, memory=4, **options)

    def cluster_context(self) -> Any:
        info = self.api.get_compute_server_info(self.workspace, self.context._compute_id)
        return self.pc.ClusterContext(
            f"https://{info.scheduler.address}",
            domain_name=info.scheduler.tls_server_name,
            extra_headers={"authorization": self.api.get_auth_header()},
            tls_options=self.pc.TLSOptions(ca_cert=info.public_server_key.encode()),
        )

    def start_registered(self, name: str) -> Any:
        self.new_context().register(name)
        return self.api.start_compute_cluster_manifest(self.workspace, name)


class Refused(NamedTuple):
    """A call that raises an error with this text in its message."""

    call: Callable[[Used], Any]
    text: str


Calls = dict[str, Callable[[Used], Any] | Refused | None]
"""The calls of one owner by name; None for a name that is not called."""

QUERIES: Calls = {
    "await_and_scan": lambda used: used.frame.await_and_scan().collect(),
    "collect": Refused(lambda used: used.frame.collect(), NO_FLIGHT),
    "collect_batches": Refused(lambda used: used.frame.collect_batches(), NO_FLIGHT),
    "execute": lambda used: used.frame.execute(),
    "explain": lambda used: used.frame.explain(plan_stage="ir"),
    "show": lambda used: used.frame.show(),
    "sink_batches": lambda used: used.frame.sink_batches(id).await_result(),
    "sink_csv": lambda used: used.frame.sink_csv(SINKS).await_result(),
    "sink_iceberg": Refused(
        lambda used: append_to_own_catalog(used.frame),
        "needs pyiceberg and PyArrow",
    ),
    "sink_ipc": lambda used: used.frame.sink_ipc(SINKS).await_result(),
    "sink_parquet": lambda used: used.frame.sink_parquet(SINKS).await_result(),
}
NAMES: dict[str, Calls] = {
    "ApiClient": {
        "authenticate": lambda used: log_in(used, used.api.authenticate),
        "cancel_proxy_query": lambda used: used.proxy_query.cancel(),
        "clear_authentication": None,
        "clear_default_organization": None,
        "clear_default_workspace": None,
        "create_aws_workspace": Refused(
            lambda used: used.api.create_aws_workspace("mine", uuid4()), ONE_EACH
        ),
        "create_on_prem_workspace": Refused(
            lambda used: used.api.create_on_prem_workspace("mine", uuid4()), ONE_EACH
        ),
        "create_organization": Refused(lambda used: used.api.create_organization("x"), ONE_EACH),
        "create_service_account": Refused(
            lambda used: used.api.create_service_account(used.workspace, "x", None), NO_ACCOUNTS
        ),
        "create_workspace": Refused(
            lambda used: used.api.create_workspace("mine", uuid4()), ONE_EACH
        ),
        "delete_on_prem_workspace": Refused(
            lambda used: used.api.delete_on_prem_workspace(used.workspace), ONE_EACH
        ),
        "delete_organization": Refused(
            lambda used: used.api.delete_organization(uuid4()), ONE_EACH
        ),
        "delete_service_account": Refused(
            lambda used: used.api.delete_service_account(used.workspace, uuid4()), NO_ACCOUNTS
        ),
        "delete_workspace": Refused(
            lambda used: used.api.delete_workspace(used.workspace), ONE_EACH
        ),
        "delete_workspace_aws_connection": Refused(
            lambda used: used.api.delete_workspace_aws_connection(used.workspace), NO_CLOUD
        ),
        "get_auth_header": None,
        "get_compute_cluster": lambda used: used.api.get_compute_cluster(
            used.workspace, used.context._compute_id
        ),
        "get_compute_cluster_manifest": lambda used: (
            used.new_context().register("found"),
            used.api.get_compute_cluster_manifest(used.workspace, "found"),
        ),
        "get_compute_cluster_nodes": Refused(
            lambda used: used.api.get_compute_cluster_nodes(
                used.workspace, used.context._compute_id
            ),
            NO_MACHINES,
        ),
        "get_compute_clusters": lambda used: used.api.get_compute_clusters(used.workspace),
        "get_compute_server_info": lambda used: used.api.get_compute_server_info(
            used.workspace, used.context._compute_id
        ),
        "get_default_organization_id": None,
        "get_default_workspace_id": None,
        "get_organization": lambda used: used.api.get_organization(used.context.organization.id),
        "get_organizations": lambda used: used.api.get_organizations(None),
        "get_queries": lambda used: used.api.get_queries(used.workspace),
        "get_query": lambda used: used.api.get_query(used.workspace, used.query._query_id),
        "get_query_result": lambda used: used.api.get_query_result(used.query._query_id),
        "get_service_accounts": Refused(
            lambda used: used.api.get_service_accounts(used.workspace), NO_ACCOUNTS
        ),
        "get_user": lambda used: used.api.get_user(),
        "get_username": None,
        "get_workspace": lambda used: used.api.get_workspace(used.workspace),
        "get_workspace_aws_connection": lambda used: used.api.get_workspace_aws_connection(
            used.workspace
        ),
        "get_workspace_cluster_defaults": lambda used: used.api.get_workspace_cluster_defaults(
            used.workspace
        ),
        "get_workspace_default_compute_specs": lambda used: (
            used.api.get_workspace_default_compute_specs(used.workspace)
        ),
        "get_workspace_setup_url": Refused(
            lambda used: used.api.get_workspace_setup_url(used.workspace), NO_CLOUD
        ),
        "get_workspace_stack": Refused(
            lambda used: used.api.get_workspace_stack(used.workspace), NO_CLOUD
        ),
        "get_workspaces": lambda used: used.api.get_workspaces(),
        "login": None,  # waits for a person; see test_device_logins.py
        "register_compute_cluster_manifest": lambda used: used.new_context().register("made"),
        "reload_config": None,
        "resolve_default_workspace_id": lambda used: used.api.resolve_default_workspace_id(),
        "set_default_organization": lambda used: (
            used.api.set_default_organization(organization_name="emulator"),
            used.api.clear_default_organization(),
        ),
        "set_default_workspace": lambda used: (
            used.api.set_default_workspace(workspace_name="playground"),
            used.api.clear_default_workspace(),
        ),
        "set_user_default_workspace": Refused(
            lambda used: used.api.set_user_default_workspace(used.workspace), NO_USER
        ),
        "set_username": None,
        "set_workspace_cluster_defaults": Refused(
            lambda used: used.api.set_workspace_cluster_defaults(
                used.workspace, None, 2, 4, None, None, 1
            ),
            NO_DEFAULTS,
        ),
        "start_compute": lambda used: used.new_context().start(),
        "start_compute_cluster_manifest": lambda used: used.start_registered("started"),
        "stop_compute_cluster": lambda used: used.api.stop_compute_cluster(
            used.workspace, used.start_registered("stopped").id
        ),
        "submit_query": lambda used: run_in_proxy_mode(used),
        "unregister_compute_cluster_manifest": lambda used: unregister(used, "forgotten"),
    },
    "ClientContext": {"show_versions": None},
    "ClusterContext": {"show_versions": lambda used: used.cluster_context().show_versions()},
    "ComputeContext": {
        "cluster_size": None,
        "connect": lambda used: used.pc.ComputeContext.connect(
            used.context._compute_id, workspace="playground"
        ),
        "connection_mode": None,
        "cpu_architectures": None,
        "cpus": None,
        "env_vars": None,
        "get_status": lambda used: used.context.get_status(),
        "instance_type": None,
        "labels": None,
        "list": lambda used: used.pc.ComputeContext.list("playground"),
        "log_level": None,
        "memory": None,
        "organization": lambda used: used.context.organization.name,
        "polars_version": None,
        "register": lambda used: used.new_context().register("nightly"),
        "select": lambda used: used.pc.ComputeContext.select("playground"),
        "show_versions": lambda used: used.context.show_versions(),
        "start": lambda used: used.new_context().start(),
        "stop": lambda used: used.context.stop(),
        "storage": None,
        "unregister": lambda used: unregister(used, "weekly"),
        "workspace": lambda used: used.context.workspace.name,
    },
    "DirectQuery": {
        "await_result": lambda used: used.query.await_result(),
        "await_result_async": lambda used: asyncio.run(used.query.await_result_async()),
        "cancel": lambda used: used.query.cancel(),
        "delete_result": lambda used: used.query.delete_result(),
        "get_status": lambda used: used.query.get_status(),
        "graph": lambda used: used.query.graph("ir", raw_output=True, show=False),
        "plan": Refused(lambda used: used.query.plan(), NO_PHYSICAL_PLAN),
    },
    "ExecuteRemote": QUERIES,
    "LazyFrameRemote": {
        **QUERIES,
        "distributed": lambda used: used.frame.distributed().execute(),
        "labels": lambda used: used.frame.labels("a=b").execute(),
        "single_node": lambda used: used.frame.single_node().execute(),
        "with_lineage": lambda used: used.frame.with_lineage(
            job_namespace="shop", job_name="daily"
        ).execute(),
    },
    "Organization": {
        "delete": Refused(lambda used: used.context.organization.delete(), ONE_EACH),
        "id": None,
        "list": lambda used: used.pc.Organization.list(),
        "load": lambda used: used.context.organization.load(),
        "name": None,
        "setup": Refused(lambda used: used.pc.Organization.setup("mine"), ONE_EACH),
    },
    "ProxyQuery": {
        "await_result": lambda used: used.proxy_query.await_result(),
        "await_result_async": lambda used: asyncio.run(used.proxy_query.await_result_async()),
        "cancel": lambda used: used.proxy_query.cancel(),
        "get_status": lambda used: used.proxy_query.get_status(),
    },
    "QueryResult": {
        "delete": lambda used: used.result.delete(),
        "failed_stages": None,
        "file_type": None,
        "finished_stages": None,
        "graph": Refused(lambda used: used.result.graph(), NO_PHYSICAL_PLAN),
        "head": lambda used: used.result.head,
        "lazy": lambda used: used.frame.execute().lazy().collect(),
        "location": None,
        "n_rows_total": None,
        "plan": lambda used: used.result.plan("ir"),
        "raise_err": lambda used: used.result.raise_err(),
        "stage_statistics": lambda used: used.result.stage_statistics(),
        "total_stages": None,
    },
    "SchedulerClient": {
        "cancel_direct_query": lambda used: used.query.cancel(),
        "delete_direct_query_result": lambda used: used.query.delete_result(),
        "do_query": lambda used: used.frame.execute(),
        "get_compute_versions": lambda used: used.scheduler.get_compute_versions(),
        "get_direct_query_plan": lambda used: used.query.plan("ir"),
        "get_direct_query_result": lambda used: used.query.await_result(),
        "get_direct_query_status": lambda used: used.query.get_status(),
        "get_query_details": lambda used: used.scheduler.get_query_details(used.query._query_id),
        "scan_flight": None,  # needs collect(), which is refused
        "without_default_auth": lambda used: used.cluster_context(),
    },
    "Workspace": {
        "aws": lambda used: used.context.workspace.aws,
        "connect_provider": Refused(
            lambda used: used.context.workspace.connect_provider(verify=False), NO_CLOUD
        ),
        "create": Refused(lambda used: used.pc.Workspace.create("mine", "emulator"), ONE_EACH),
        "defaults": lambda used: used.context.workspace.defaults,
        "delete": Refused(lambda used: used.context.workspace.delete(), ONE_EACH),
        "deploy": Refused(lambda used: used.context.workspace.deploy(verify=False), NO_CLOUD),
        "id": None,
        "is_active": lambda used: used.context.workspace.is_active(),
        "list": lambda used: used.pc.Workspace.list(),
        "load": lambda used: used.context.workspace.load(),
        "name": None,
        "organization": lambda used: used.context.workspace.organization.name,
        "set_default": Refused(lambda used: used.context.workspace.set_default(), NO_USER),
        "setup": Refused(lambda used: used.pc.Workspace.setup("mine", "emulator"), ONE_EACH),
        "status": lambda used: used.context.workspace.status,
        "wait_until_active": lambda used: used.context.workspace.wait_until_active(),
    },
    "WorkspaceProviderAWS": {
        "connect": Refused(lambda used: used.aws.connect(verify=False), NO_CLOUD),
        "disconnect": lambda used: used.aws.disconnect(),
        "is_connected": lambda used: used.aws.is_connected(),
        "wait_until_connected": Refused(
            lambda used: used.aws.wait_until_connected(interval=1, timeout=0),
            "Verifying the AWS connection has timed out",
        ),
    },
}
FUNCTIONS: Calls = {
    "QueryCloudObserver": lambda used: monitor(used),
    "authenticate": lambda used: log_in(used, used.pc.authenticate),
    "cli_main": None,  # the command `pc`, below
    "login": None,  # waits for a person; see test_device_logins.py
    "set_compute_context": None,
    "show_versions": lambda used: used.pc.show_versions(used.context),
    "spawn": lambda used: used.pc.spawn(LINES, dst=SINKS, context=used.context).await_result(),
    "spawn_blocking": lambda used: used.pc.spawn_blocking(LINES, dst=SINKS, context=used.context),
    "spawn_many": lambda used: [
        query.await_result()
        for query in used.pc.spawn_many(
            [LINES], dst=used.pc.ParquetDst(SINKS), context=used.context
        )
    ],
    "spawn_many_blocking": lambda used: used.pc.spawn_many_blocking(
        [LINES], dst=used.pc.ParquetDst(SINKS), context=used.context
    ),
}
LOCAL = {
    *("ClientOptions", "ComputeContextStatus", "Config", "CsvDst", "IpcDst", "LogLevelModel"),
    *("ParquetDst", "ProviderType", "QueryDetail", "QueryInfo", "QueryPlanTiming", "QueryStatus"),
    *("StageStatistics", "TLSOptions", "WorkspaceDefaultComputeSpecs", "WorkspaceStatus"),
    *("__version__", "exceptions"),
}
"""Public names of values and settings, which send no requests."""
COMMANDS: dict[str, tuple[int, str] | None] = {
    "authenticate": (0, "Successfully logged in"),
    "compute details -w playground --id {cluster}": (0, "{cluster}"),
    "compute list -w playground": (0, "Idle"),
    "compute start -w playground --cpus 2 --memory 4 --wait": (0, "is ready"),
    "compute stop -w playground --id {cluster}": (0, "{cluster}"),
    "login": None,  # waits for a person; see test_device_logins.py
    "organization delete -n emulator": (1, ONE_EACH),
    "organization details -n emulator": (0, "emulator"),
    "organization list": (0, "emulator"),
    "organization setup -n mine": (1, ONE_EACH),
    "service-account create -w playground -n mine": (1, NO_ACCOUNTS),
    "workspace aws connect -w playground": (1, NO_CLOUD),
    "workspace aws disconnect -w playground": (0, "nothing to disconnect"),
    "workspace aws verify -w playground": (1, "has no AWS account connected"),
    "workspace create -o emulator -w mine": (1, ONE_EACH),
    "workspace delete -w playground": (1, ONE_EACH),
    "workspace details -w playground": (0, "playground"),
    "workspace list": (0, "playground"),
    "workspace verify -w playground": (1, "has no AWS account connected"),
}
"""Exit code and output of each command of `pc`."""


def append_to_own_catalog(frame: Any) -> Any:
    from pyiceberg.catalog.sql import SqlCatalog

    warehouse = "s3://your-bucket/warehouse"
    with contextlib.closing(
        SqlCatalog("shop", uri="sqlite:///:memory:", warehouse=warehouse)
    ) as catalog:
        return frame.sink_iceberg("shop.sales", mode="append", catalog=catalog)


def log_in(used: Used, authenticate: Callable[..., None]) -> None:
    authenticate(
        client_id=used.environment["POLARS_CLOUD_CLIENT_ID"],
        client_secret=used.environment["POLARS_CLOUD_CLIENT_SECRET"],
    )


def unregister(used: Used, name: str) -> None:
    used.new_context().register(name)
    used.pc.ComputeContext(workspace="playground", name=name).unregister()


def run_in_proxy_mode(used: Used) -> None:
    context = used.new_context(connection_mode="proxy")
    context.start()
    LINES.remote(context).execute()


def monitor(used: Used) -> None:
    """Report a local query to Polars Cloud; the client ignores all errors of this report."""
    observer = used.pc.QueryCloudObserver("playground")
    observer.on_query_started(uuid4())
    observer.on_query_planned(uuid4(), None, b"", None).close()
    observer.on_query_failed(uuid4(), "ValueError: no")


def problem_of(call: Callable[[Used], Any] | Refused, used: Used) -> str | None:
    if not isinstance(call, Refused):
        call(used)
        return None
    try:
        call.call(used)
    except Exception as error:
        return None if call.text in str(error) else f"another error: {error}"
    return "not refused"


@pytest.fixture
def used(emulator: RunningEmulator, pc: ModuleType, start_cluster: Callable[..., Any]) -> Used:
    context = start_cluster()
    frame = LINES.remote(context)
    query = pc.spawn(LINES, dst=SINKS, context=context)
    return Used(emulator.environment, pc, context, frame, query, query.await_result())


@pytest.fixture(autouse=True)
def _person_who_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(question: str = "") -> str:
        return "1" if "Select" in question else "y"

    monkeypatch.setattr("builtins.input", answer)


def test_every_public_name_has_a_row(pc: ModuleType) -> None:
    names = {*NAMES, *FUNCTIONS, *LOCAL} - {"ApiClient", "SchedulerClient"}
    assert names == set(pc.__all__)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("owner", [*NAMES, "functions"])
def test_every_name_works_or_is_refused_with_a_clear_error(
    emulator: RunningEmulator, used: Used, owner: str
) -> None:
    calls = NAMES.get(owner, FUNCTIONS)
    if owner != "functions":
        import polars_cloud.polars_cloud as binary

        names = dir(getattr(used.pc, owner, None) or getattr(binary, owner))
        assert calls.keys() == {name for name in names if not name.startswith("_")}
    if owner == "ExecuteRemote":
        used = used._replace(frame=used.frame.single_node())
    problems = {
        name: problem
        for name, call in calls.items()
        if call is not None and (problem := problem_of(call, used)) is not None
    }
    assert problems == {}
    assert emulator.state()["unmatched"] == []


def run_pc(emulator: RunningEmulator, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [Path(sys.executable).parent / "pc", *arguments],
        env=os.environ | emulator.environment,
        input="y\n",
        capture_output=True,
        text=True,
        timeout=60,
    )


WALK = """
import os
import sys

import polars_cloud

def help_of(*group):
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(write, 1)
        sys.argv = ["pc", *group, "--help"]
        polars_cloud.cli_main()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as text:
        return text.read()

def walk(*group):
    _, _, table = help_of(*group).partition("\\nCommands:\\n")
    names = [line.split()[0] for line in table.partition("\\n\\n")[0].splitlines()]
    if not names:
        print(" ".join(group))
    for name in names:
        if name != "help":
            walk(*group, name)

walk()
"""
"""Prints each command in the help of `pc` and of its groups, from one process."""


def test_every_command_has_a_row(emulator: RunningEmulator) -> None:
    walked = subprocess.run(
        [sys.executable, "-c", WALK],
        env=os.environ | emulator.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    rows = {command.partition(" -")[0] for command in COMMANDS}
    assert rows == set(walked.stdout.splitlines()), walked.stderr


@pytest.mark.parametrize("command", [command for command, outcome in COMMANDS.items() if outcome])
def test_every_command_works_or_is_refused_with_a_clear_error(
    emulator: RunningEmulator, start_cluster: Callable[..., Any], command: str
) -> None:
    cluster = str(start_cluster()._compute_id)
    ran = run_pc(emulator, *command.format(cluster=cluster).split())
    outcome = COMMANDS[command]
    assert outcome is not None
    assert ran.returncode == outcome[0], ran.stdout + ran.stderr
    assert outcome[1].format(cluster=cluster) in ran.stdout + ran.stderr
    assert emulator.state()["unmatched"] == []
