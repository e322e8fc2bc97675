"""Private names of `polars_cloud` and of Airflow are used in one module each, and still exist."""

import ast
import inspect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn
from uuid import UUID

import polars as pl
import pytest
from airflow.sdk.execution_time import task_runner

from polars_cloud_emulator.testing import RunningEmulator
from polars_remote.cloud import client
from polars_remote.cloud.client import (
    COMPARED_AS_WRITTEN,
    SPEC,
    QueryClient,
    connect_queries,
    connect_query,
    forget_cluster,
    frontend_domain,
    get_changes,
    get_client,
    get_cluster_id,
    get_cluster_status,
    get_context,
    get_manifest_name,
    get_query_client,
    get_query_id,
    get_result_info,
    get_spec,
    is_query,
    is_result,
    list_queries,
    misspecified_error,
    not_found_error,
    send_queries_through,
    start_without_waiting,
    unregister_manifest,
    was_available,
)
from polars_remote.cloud.manifests import register_manifest
from polars_remote.cloud.plans import read_plan
from polars_remote.cloud.session import EMULATOR, CloudSession
from polars_remote.compat import internals
from tests.observed import cluster_statuses
from tests.tries import Supervisor

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "plugins" / "polars_remote"
CLIENT = FOLDER / "cloud" / "client.py"
AIRFLOW = FOLDER / "compat" / "internals.py"
CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}
LF = pl.LazyFrame({"x": [1]})
FILE = "s3://your-bucket/results/one.parquet"
PRIVATE_MODULES = {
    "polars_cloud.polars_cloud",
    "polars_cloud.constants",
    "airflow.sdk.execution_time",
    "airflow.sdk.execution_time.task_runner",
}
PRIVATE_NAMES = {
    "task_runner",
    "SUPERVISOR_COMMS",
    "TRIGGER_FAIL_REPR",
    "API_CLIENT",
    "FRONTEND_DOMAIN",
}


@pytest.mark.parametrize("counts", [True, False])
def test_a_clear_that_airflow_does_not_count_is_noticed_by_the_tries_that_it_adds(
    counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internals, "COUNTS_CLEARED_TASKS", counts)

    def number(clear_number: int | None, max_tries: int) -> int:
        run, ti = SimpleNamespace(clear_number=clear_number), SimpleNamespace(max_tries=max_tries)
        context: Any = {"dag_run": run, "ti": ti}
        return internals.get_clear_number(context)

    assert number(None, 1) == number(0, 1) != number(1, 1)
    assert (number(0, 1) == number(0, 2)) == counts


def modules() -> list[Path]:
    folders = (ROOT / "include", ROOT / "plugins")
    found = sorted(path for folder in folders for path in folder.rglob("*.py"))
    assert set(found) > {CLIENT, AIRFLOW}
    return found


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def session(pc: ModuleType, supervisor: Supervisor) -> CloudSession:
    return CloudSession("polars_cloud")


@pytest.fixture
def ctx(session: CloudSession) -> Any:
    """The client's own context of a manifest whose cluster never started."""
    return register_manifest(session, CLUSTER, lambda: False)


# Where private names are taken


def private_uses(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, value=owner) if is_private(name):
                if not belongs_to_this_folder(owner):
                    yield f"line {node.lineno}: {ast.unparse(node)}"
            case ast.Import(names=names):
                yield from (f"import {each.name}" for each in names if is_private_path(each.name))
            case ast.ImportFrom(module=str(module), level=0, names=names):
                for each in names:
                    if (
                        is_private_path(module)
                        or is_private_path(f"{module}.{each.name}")
                        or is_private(each.name)
                    ):
                        yield f"from {module} import {each.name}"
            case ast.Constant(value=str(text)) if is_private(text):
                yield f"line {node.lineno}: {text!r}"
            case ast.Name(id=name) if name in PRIVATE_NAMES:
                yield f"line {node.lineno}: {name}"


def is_private(name: str) -> bool:
    is_public_all_the_same = name.startswith("__") or name in {
        "_",
        "_replace",
    }  # methods of named tuples
    is_underscored = name.isidentifier() and name.startswith("_") and not is_public_all_the_same
    return is_underscored or name in PRIVATE_NAMES


def is_private_path(module: str) -> bool:
    return module in PRIVATE_MODULES or any(map(is_private, module.split(".")[1:]))


def belongs_to_this_folder(owner: ast.expr) -> bool:
    return isinstance(owner, ast.Name) and owner.id in {"self", "cls", "scope"}


@pytest.mark.parametrize("path", modules(), ids=place)
def test_no_other_module_takes_a_private_name(path: Path) -> None:
    uses = list(private_uses(ast.parse(path.read_text())))
    if path in (CLIENT, AIRFLOW):
        assert uses, "found none: the test does not see them any more"
    else:
        where = f"{place(CLIENT)} or {place(AIRFLOW)}"
        assert uses == [], f"{place(path)} takes private names: move them to {where}"


def test_each_of_the_two_modules_takes_the_names_of_one_package() -> None:
    assert "airflow" not in CLIENT.read_text()
    assert "polars_cloud" not in AIRFLOW.read_text()


@pytest.mark.parametrize(
    "source",
    [
        "ctx._compute_id",
        "getattr(ctx, '_compute_id')",
        "import polars_cloud.constants",
        "import polars_cloud.polars_cloud as pcr",
        "from polars_cloud.polars_cloud import NotFoundError",
        "from polars_cloud import constants",
        "from polars_cloud.context._names import x",
        "from airflow.sdk.execution_time import task_runner",
        "from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS",
        "from airflow.sdk.bases.operator import TRIGGER_FAIL_REPR",
        "task_runner.SUPERVISOR_COMMS",
    ],
)
def test_a_private_name_is_seen(source: str) -> None:
    assert list(private_uses(ast.parse(source)))


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=place)
def test_the_folder_can_be_renamed_as_a_whole(path: Path) -> None:
    assert list(outer_imports(path.read_text(), len(path.relative_to(FOLDER).parts))) == []


def outer_imports(source: str, depth: int) -> Iterator[str]:
    """Yield imports of the folder's package by name, and relative imports that leave the folder.

    Parameters
    ----------
    depth
        Number of dots from the module to the folder.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(level=0, module=str(module)):
                names_it = module.partition(".")[0] in {"include", FOLDER.name}
            case ast.ImportFrom(level=level):
                names_it = level > depth
            case ast.Import(names=names):
                names_it = any(
                    each.name.partition(".")[0] in {"include", FOLDER.name} for each in names
                )
            case _:
                continue
        if names_it:
            yield ast.unparse(node)


@pytest.mark.parametrize(
    ("source", "depth"),
    [
        ("from .. import auth", 1),
        ("from ..auth import authenticate", 1),
        ("from ... import auth", 2),
        ("from ...auth import authenticate", 2),
        ("from polars_remote import queries", 1),
        ("from polars_remote import queries", 2),
        ("import include.auth", 2),
    ],
)
def test_an_import_that_leaves_the_folder_is_seen(source: str, depth: int) -> None:
    assert list(outer_imports(source, depth)) == [source]


@pytest.mark.parametrize(
    ("source", "depth"),
    [
        ("from . import queries", 1),
        ("from .cloud.client import SPEC", 1),
        ("from .. import settings", 2),
        ("from ..cloud.client import SPEC", 2),
        ("from .client import SPEC", 2),
        ("import polars_cloud", 2),
    ],
)
def test_an_import_inside_the_folder_is_allowed(source: str, depth: int) -> None:
    assert list(outer_imports(source, depth)) == []


# What there still is


def names_taken(path: Path) -> set[str]:
    """Return the private attributes that a module uses, and its imports from private modules."""
    taken = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(attr=name) | ast.Constant(value=str(name)) if (
                name.isidentifier() and name.startswith("_") and not name.startswith("__")
            ):
                taken.add(name)
            case ast.ImportFrom(module=str(module), names=names) if module in PRIVATE_MODULES:
                taken |= {each.name for each in names}
    return taken


def names_defined(path: Path) -> set[str]:
    """Return the names that a module's classes define."""
    defined = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for each in node.body if isinstance(node, ast.ClassDef) else ():
            match each:
                case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                    defined.add(name)
    return defined


@pytest.fixture
def clients_objects(pc: ModuleType, ctx: Any) -> dict[str, tuple[Any, ...]]:
    """Return the object that has each private name of the client."""
    from polars_cloud import constants, polars_cloud

    ctx.start()
    query = LF.remote(ctx).execute(blocking=False)
    info = constants.API_CLIENT.get_compute_server_info(ctx.workspace.id, ctx._compute_id)
    own = pc.ClusterContext(
        f"https://{info.scheduler.address}",
        domain_name=info.scheduler.tls_server_name,
        tls_options=pc.TLSOptions(ca_cert=info.public_server_key.encode()),
    )
    return {
        "_compute_id": (ctx, own),
        "_name": (ctx,),
        "_direct_client": (ctx, own),
        "_connection_mode": (ctx, own),
        "_last_known_status": (ctx,),
        "_idle_timeout_mins": (ctx,),
        # A context by name has none; it is read from the manifest.
        "_requirements_txt": (pc.ComputeContext(workspace="playground", cpus=2, memory=4),),
        "_get_direct_client": (ctx, pc.ComputeContext),
        "_query_id": (query,),
        "_client": (query,),
        "_cluster": (query,),
        "_from_api_model": (pc.ComputeContextStatus,),
        "SchedulerClient": (polars_cloud,),
        "QueryInfoPy": (polars_cloud,),
        "PyLineageContext": (polars_cloud,),
        "NotFoundError": (polars_cloud,),
        "ComputeClusterMisspecified": (polars_cloud,),
        "API_CLIENT": (constants,),
        "FRONTEND_DOMAIN": (constants,),
    }


def test_each_private_name_of_the_client_is_still_there(
    clients_objects: dict[str, tuple[Any, ...]],
) -> None:
    ours = names_defined(CLIENT) - clients_objects.keys()
    assert names_taken(CLIENT) - ours == clients_objects.keys(), "say here where to look these up"
    vanished = [
        f"{type(owner).__name__}.{name}"
        for name, owners in clients_objects.items()
        for owner in owners
        if not hasattr(owner, name)
    ]
    assert vanished == [], f"polars_cloud has no {', '.join(vanished)} any more"


def test_each_call_of_the_clients_private_api_is_still_there(pc: ModuleType) -> None:
    from polars_cloud.constants import API_CLIENT
    from polars_cloud.polars_cloud import SchedulerClient

    called = set()
    for node in ast.walk(ast.parse(CLIENT.read_text())):
        match node:
            case ast.Attribute(attr=name, value=ast.Name(id="API_CLIENT")):
                called.add(name)
    assert len(called) > 5, "found too few: the test does not see them any more"
    assert {name for name in called if not hasattr(API_CLIENT, name)} == set()
    on_cluster = {name for name in vars(QueryClient) if not name.startswith("_")}
    on_cluster |= {"get_query_details", "without_default_auth"}
    assert "do_query" in on_cluster
    assert {name for name in on_cluster if not hasattr(SchedulerClient, name)} == set()


def test_each_private_name_of_airflow_is_still_there(supervisor: object) -> None:
    from airflow import models
    from airflow.api_fastapi.core_api import security
    from airflow.sdk.api.datamodels._generated import DagRun, TIRunContext
    from airflow.sdk.bases import operator
    from airflow.sdk.execution_time import supervisor as supervisors
    from airflow.utils import session

    looked_up = {
        "task_runner.SUPERVISOR_COMMS": hasattr(task_runner, "SUPERVISOR_COMMS"),
        "task_runner.RuntimeTaskInstance.get_task_states": hasattr(
            task_runner.RuntimeTaskInstance, "get_task_states"
        ),
        "dag_run.clear_number": "clear_number" in DagRun.model_fields,
        "RuntimeTaskInstance._ti_context_from_server.next_method": "next_method"
        in TIRunContext.model_fields
        and "_ti_context_from_server" in task_runner.RuntimeTaskInstance.__private_attributes__,
        "airflow.sdk.bases.operator.TRIGGER_FAIL_REPR": hasattr(operator, "TRIGGER_FAIL_REPR"),
        "supervisor.InProcessSupervisorComms": hasattr(supervisors, "InProcessSupervisorComms"),
        "airflow.sdk.serde": find_spec("airflow.sdk.serde") is not None,
        "airflow.api_fastapi.core_api.security.requires_access_variable": hasattr(
            security, "requires_access_variable"
        ),
        "airflow.models.Variable": hasattr(models, "Variable"),
        "airflow.models.TaskInstance": hasattr(models, "TaskInstance"),
        "airflow.utils.session.create_session": hasattr(session, "create_session"),
    }
    vanished = [name for name, is_there in looked_up.items() if not is_there]
    assert vanished == [], f"Airflow has no {', '.join(vanished)} any more"
    parameters = inspect.signature(task_runner.RuntimeTaskInstance.get_task_states).parameters
    missing = {"dag_id", "run_ids", "task_ids", "map_index"} - parameters.keys()
    assert missing == set(), f"get_task_states takes no {missing} any more"


def test_each_option_of_a_cluster_is_compared_or_left_out_on_purpose(pc: ModuleType) -> None:
    options = set(inspect.signature(pc.ComputeContext.__init__).parameters) - {"self"}
    # Where it runs, and what it is called.
    left_out = {"name", "workspace", "labels", "insecure"}
    assert options - left_out == SPEC.keys()


# What they do: clusters


def test_a_context_gives_its_cluster_and_its_manifest(pc: ModuleType, ctx: Any) -> None:
    assert get_manifest_name(ctx) == "shop"
    assert get_cluster_id(ctx) is None
    ctx.start()
    assert get_cluster_id(ctx) is not None
    assert get_manifest_name(pc.ComputeContext(workspace="playground", cpus=2, memory=4)) is None


def test_a_context_that_has_forgotten_its_failed_cluster_starts_another(
    ctx: Any, emulator: RunningEmulator
) -> None:
    emulator.add_fault("POST manifest/start", "startup_fails", message="no machines left")
    with pytest.raises(RuntimeError, match="no machines left"):
        ctx.start()
    with pytest.raises(RuntimeError, match="failed state"):
        ctx.start()
    forget_cluster(ctx)
    ctx.start()
    assert cluster_statuses(emulator) == ["Failed", "Idle"]


def test_a_start_without_waiting_returns_while_the_cluster_starts(
    ctx: Any, emulator: RunningEmulator
) -> None:
    assert not was_available(ctx)
    emulator.add_fault("POST manifest/start", "startup_takes", seconds=60)
    start_without_waiting(ctx)
    assert cluster_statuses(emulator) == ["Starting"]
    assert not was_available(ctx)
    cluster_id = get_cluster_id(ctx)
    assert cluster_id is not None
    assert cluster_id == emulator.state()["clusters"][0]["id"]
    assert get_cluster_status(cluster_id, ctx.workspace) == ("STARTING", "")


def test_a_context_knows_that_its_cluster_was_available(ctx: Any) -> None:
    start_without_waiting(ctx)
    ctx.get_status()
    assert was_available(ctx)


def test_a_second_start_of_a_manifest_finds_its_live_cluster(
    ctx: Any, emulator: RunningEmulator
) -> None:
    start_without_waiting(ctx)
    first = get_cluster_id(ctx)
    start_without_waiting(ctx)
    assert get_cluster_id(ctx) == first
    assert len(cluster_statuses(emulator)) == 1


def test_a_clusters_status_says_why_it_has_failed(ctx: Any, emulator: RunningEmulator) -> None:
    emulator.add_fault("POST manifest/start", "startup_fails", message="no machines left")
    start_without_waiting(ctx)
    cluster_id = get_cluster_id(ctx)
    assert cluster_id is not None
    assert get_cluster_status(cluster_id, ctx.workspace) == ("FAILED", "no machines left")


def test_a_registered_specification_is_the_one_that_was_asked_for(pc: ModuleType) -> None:
    options: dict[str, Any] = {
        "cpus": 4,
        "memory": 8,
        "storage": 50,
        "cluster_size": 3,
        "env_vars": {"TZ": "UTC"},
        "log_level": "debug",
        "idle_timeout_mins": 20,
        "requirements": b"numpy==2.3.5\n",
    }
    wanted = pc.ComputeContext(workspace="playground", **options)
    wanted.register("shop")
    registered = pc.ComputeContext(workspace="playground", name="shop")
    spec = get_spec(pc.ComputeContext(workspace="playground", **options))
    assert get_spec(registered) == spec
    expected = {**options, "requirements": "numpy==2.3.5\n"}
    assert {name: spec[name] for name in options} == expected


def test_an_option_that_is_compared_as_written_is_kept_as_written(pc: ModuleType) -> None:
    options: dict[str, Any] = {
        "cpus": 4,
        "memory": 8,
        "storage": 50,
        "cluster_size": 3,
        "env_vars": {"TZ": "UTC"},
        "idle_timeout_mins": 20,
    }
    # In place of `cpus` and `memory`.
    by_type: dict[str, Any] = {"instance_type": "t3.medium"}
    assert options.keys() | by_type.keys() == COMPARED_AS_WRITTEN
    for name, each in (("shop", options), ("typed", by_type)):
        pc.ComputeContext(workspace="playground", **each).register(name)
        registered = pc.ComputeContext(workspace="playground", name=name)
        assert get_changes(registered, each) == {}
    registered = pc.ComputeContext(workspace="playground", name="shop")
    assert get_changes(registered, {"cpus": 2, "memory": 8}) == {"cpus": (4, 2)}


def test_unregistering_can_be_repeated(ctx: Any, emulator: RunningEmulator) -> None:
    for _ in range(2):
        unregister_manifest(ctx, "shop")
    assert emulator.state()["manifests"] == []


def test_the_clients_errors_are_distinguished(pc: ModuleType, ctx: Any) -> None:
    with pytest.raises(not_found_error()):
        pc.ComputeContext(workspace="playground", name="nowhere")
    with pytest.raises(misspecified_error()):
        pc.ComputeContext(workspace="playground", name="shop", cpus=2)


# What they do: queries


def test_a_query_gives_its_id_its_context_and_its_client_and_is_listed(ctx: Any) -> None:
    ctx.start()
    query: Any = LF.remote(ctx).single_node().sink_parquet(FILE)
    assert is_query(query)
    assert get_context(query) is ctx
    assert get_client(query) is get_query_client(ctx)
    assert list(list_queries(ctx)) == [(get_query_id(query), FILE)]
    connected = connect_query(get_query_id(query), ctx)
    result = connected.await_result()
    assert is_result(result)
    assert not is_query(result)
    assert not is_result(query)
    assert result.location == [FILE]
    assert get_result_info(result) is not None


def test_queries_of_another_cluster_are_not_listed(pc: ModuleType, ctx: Any) -> None:
    ctx.start()
    LF.remote(ctx).single_node().sink_parquet(FILE).await_result()
    other = pc.ComputeContext(workspace="playground", cpus=2, memory=4)
    other.start()
    assert list(list_queries(other)) == []


def test_queries_that_were_connected_keep_their_login_when_another_account_logs_in(
    pc: ModuleType, ctx: Any, emulator: RunningEmulator
) -> None:
    ctx.start()
    query: Any = LF.remote(ctx).single_node().sink_parquet(FILE)
    connect = connect_queries(ctx)
    client_id, secret = emulator.add_service_account("second")
    pc.authenticate(client_id=client_id, client_secret=secret, interactive=False)
    before = len(emulator.journal())
    assert connect(get_query_id(query)).await_result().location == [FILE]
    query.get_status()  # on the context's connection, whose login is the latest
    [result, status] = emulator.journal()[before:]
    assert (result["account"], status["account"]) == (EMULATOR, client_id)


class Redirected(Exception):
    """Raised when a query goes through the replaced client."""


class Capturing:
    """Client that captures calls, and sends nothing."""

    def __init__(self) -> None:
        self.plans: list[bytes] = []

    def do_query(
        self,
        *,
        plan: bytes,
        settings: Any,
        labels: list[str] | None,
        execution_id: str | None,
        lineage_context: Any,
    ) -> NoReturn:
        self.plans.append(plan)
        raise Redirected

    def get_direct_query_status(self, query_id: UUID) -> NoReturn:
        raise AssertionError

    def get_direct_query_result(self, query_id: UUID, timeout_ms: int) -> NoReturn:
        raise AssertionError

    def cancel_direct_query(self, query_id: UUID) -> None:
        raise AssertionError


FOLDER_URI = "s3://your-bucket/results/one/"
PARTITIONS_URI = "s3://your-bucket/x/"
PARTITIONS = pl.PartitionBy(PARTITIONS_URI, key="x")


def spawn(_: object, ctx: Any) -> object:
    from polars_cloud import spawn

    return spawn(LF, dst=FOLDER_URI, context=ctx)


def sink_with_engine(_: object, ctx: Any) -> object:
    return LF.sink_parquet(FOLDER_URI, engine=pl.RemoteEngine(ctx))


ROUTES: dict[str, tuple[Callable[[Any, Any], object], tuple[str, ...], bool]] = {
    # The call, its destinations, and whether its result has a location.
    "sink_parquet": (lambda remote, _: remote.sink_parquet(FOLDER_URI), (FOLDER_URI,), True),
    "sink_csv": (lambda remote, _: remote.sink_csv(FOLDER_URI), (FOLDER_URI,), True),
    "sink_ipc": (lambda remote, _: remote.sink_ipc(FOLDER_URI), (FOLDER_URI,), True),
    "partitions": (lambda remote, _: remote.sink_parquet(PARTITIONS), (PARTITIONS_URI,), True),
    "sink_batches": (lambda remote, _: remote.sink_batches(print), (), False),
    "execute": (lambda remote, _: remote.execute(blocking=False), (), True),
    "execute and wait": (lambda remote, _: remote.execute(), (), True),
    "await_and_scan": (lambda remote, _: remote.await_and_scan(), (), True),
    "show": (lambda remote, _: remote.show(), (), True),
    "explain": (lambda remote, _: remote.explain(), (), False),
    "spawn": (spawn, (FOLDER_URI,), True),
    "RemoteEngine": (sink_with_engine, (FOLDER_URI,), True),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mode", ["single_node", "distributed"])
def test_each_route_of_a_query_passes_the_client_that_was_given(
    ctx: Any, emulator: RunningEmulator, mode: str, route: str
) -> None:
    send_queries_through(capturing := Capturing(), ctx)
    call, destinations, has_location = ROUTES[route]
    with pytest.raises(Redirected):
        call(getattr(LF.remote(ctx), mode)(), ctx)
    [plan] = capturing.plans
    found = read_plan(plan)
    assert (found.destinations, found.has_location) == (destinations, has_location)
    assert cluster_statuses(emulator) == []


def test_a_context_whose_queries_are_redirected_starts_nothing_by_itself(
    ctx: Any, emulator: RunningEmulator
) -> None:
    send_queries_through(Capturing(), ctx)
    ctx.start()
    assert cluster_statuses(emulator) == []
    assert get_manifest_name(ctx) == "shop"


def test_other_contexts_are_not_redirected(ctx: Any, session: CloudSession) -> None:
    send_queries_through(Capturing(), ctx)
    other: Any = register_manifest(session, CLUSTER, lambda: False)
    other.start()
    assert LF.remote(other).execute().n_rows_total == 1


def test_a_redirected_contexts_own_connection_is_the_clients(ctx: Any) -> None:
    from polars_cloud.polars_cloud import SchedulerClient

    ctx.start()
    send_queries_through(Capturing(), ctx)
    assert isinstance(get_query_client(ctx), SchedulerClient)


def test_the_pages_of_polars_cloud_have_an_address(pc: ModuleType) -> None:
    assert frontend_domain()
    assert "://" not in frontend_domain()


def test_nothing_of_the_client_is_imported_before_it_is_needed() -> None:
    tree = ast.parse(inspect.getsource(client))
    imported = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("polars_cloud" in ast.unparse(node) for node in imported)
