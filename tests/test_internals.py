"""What is private to `polars_cloud` and Airflow is taken in two modules, and is still there."""

import ast
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from airflow.sdk.execution_time import task_runner

from include.polars_remote import client_internals
from include.polars_remote.client_internals import (
    SPEC,
    connect_query,
    forget_cluster,
    frontend_domain,
    get_cluster_id,
    get_context,
    get_destination,
    get_manifest_name,
    get_query_id,
    get_spec,
    list_queries,
    misspecified_error,
    not_found_error,
    unregister_manifest,
    with_labels,
)
from include.polars_remote.clusters import compute_context
from include.polars_remote.manifests import ensure_manifest
from polars_cloud_emulator.testing import RunningEmulator
from tests.observed import cluster_statuses

INCLUDE = Path(__file__).parents[1] / "include"
FOLDER = INCLUDE / "polars_remote"
INTERNALS = {FOLDER / "airflow_internals.py", FOLDER / "client_internals.py"}
CLUSTER = {"name": "shop", "cpus": 2, "memory": 4}
PRIVATE_MODULES = {
    "polars_cloud.polars_cloud",
    "polars_cloud.constants",
    "airflow.sdk.execution_time",
    "airflow.sdk.execution_time.task_runner",
}
PRIVATE_NAMES = {"task_runner", "SUPERVISOR_COMMS", "API_CLIENT", "FRONTEND_DOMAIN"}


def modules() -> list[Path]:
    found = sorted(INCLUDE.rglob("*.py"))
    assert set(found) > INTERNALS
    return found


def place(path: Path) -> str:
    return str(path.relative_to(INCLUDE))


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
    is_public_all_the_same = name.startswith("__") or name in {"_", "_replace"}  # of named tuples
    is_underscored = name.isidentifier() and name.startswith("_") and not is_public_all_the_same
    return is_underscored or name in PRIVATE_NAMES


def is_private_path(module: str) -> bool:
    return module in PRIVATE_MODULES or any(map(is_private, module.split(".")[1:]))


def belongs_to_this_folder(owner: ast.expr) -> bool:
    return isinstance(owner, ast.Name) and owner.id in {"self", "cls", "scope"}


@pytest.mark.parametrize("path", modules(), ids=place)
def test_no_other_module_takes_a_private_name(path: Path) -> None:
    uses = list(private_uses(ast.parse(path.read_text())))
    if path in INTERNALS:
        assert uses, "found none: the test does not see them any more"
    else:
        assert uses == [], f"{path.name} takes private names: move them to an *_internals.py"


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
        "task_runner.SUPERVISOR_COMMS",
    ],
)
def test_a_private_name_is_seen(source: str) -> None:
    assert list(private_uses(ast.parse(source)))


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=place)
def test_the_folder_can_be_renamed_as_a_whole(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").partition(".")[0] not in {"include", FOLDER.name}
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "reaches out of the folder"
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("include") for name in node.names)


# What there still is


def names_taken(path: Path) -> set[str]:
    """Private attributes that a module takes, and what it imports from private modules."""
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


@pytest.fixture
def clients_objects(pc: ModuleType) -> dict[str, tuple[Any, ...]]:
    """Where each private name of the client's is looked up."""
    from polars_cloud import constants, polars_cloud

    ctx = compute_context(CLUSTER)
    ctx.start()
    remote = pl.LazyFrame({"x": [1]}).remote(ctx)
    query = remote.execute(blocking=False)
    return {
        "_compute_id": (ctx,),
        "_name": (ctx,),
        "_direct_client": (ctx,),
        "_last_known_status": (ctx,),
        "_idle_timeout_mins": (ctx,),
        # Of a context by name there is none: the manifest is asked for it.
        "_requirements_txt": (pc.ComputeContext(workspace="playground", cpus=2, memory=4),),
        "_get_direct_client": (ctx,),
        "_query_id": (query,),
        "_client": (query,),
        "_from_api_model": (pc.ComputeContextStatus,),
        "SchedulerClient": (polars_cloud,),
        "_cluster": (query,),
        "_labels": (remote, remote.single_node()),
        "_pl_partition_by": (pl.PartitionBy("s3://your-bucket/x/", key="x"),),
        "NotFoundError": (polars_cloud,),
        "ComputeClusterMisspecified": (polars_cloud,),
        "API_CLIENT": (constants,),
        "FRONTEND_DOMAIN": (constants,),
    }


def test_each_private_name_of_the_client_is_still_there(
    clients_objects: dict[str, tuple[Any, ...]],
) -> None:
    taken = names_taken(FOLDER / "client_internals.py")
    assert taken <= clients_objects.keys(), "say in this test where to look these up"
    vanished = [
        f"{type(owner).__name__}.{name}"
        for name in sorted(taken)
        for owner in clients_objects[name]
        if not hasattr(owner, name)
    ]
    assert vanished == [], f"polars_cloud has no {', '.join(vanished)} any more"


def test_each_private_name_of_airflow_is_still_there(supervisor: object) -> None:
    from airflow.sdk.api.datamodels._generated import DagRun, TIRunContext
    from airflow.sdk.bases import operator

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
        "airflow.sdk.serde": find_spec("airflow.sdk.serde") is not None,
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


# What they do


def test_a_context_gives_its_cluster_and_its_manifest(pc: ModuleType) -> None:
    ctx = ensure_manifest(CLUSTER)
    assert get_manifest_name(ctx) == "shop"
    assert get_cluster_id(ctx) is None
    ctx.start()
    assert get_cluster_id(ctx) is not None
    assert get_manifest_name(pc.ComputeContext(workspace="playground", cpus=2, memory=4)) is None


def test_a_context_that_has_forgotten_its_failed_cluster_starts_another(
    pc: ModuleType, emulator: RunningEmulator
) -> None:
    ctx = ensure_manifest(CLUSTER)
    emulator.add_fault("POST manifest/start", "startup_fails", message="no machines left")
    with pytest.raises(RuntimeError, match="no machines left"):
        ctx.start()
    with pytest.raises(RuntimeError, match="failed state"):
        ctx.start()
    forget_cluster(ctx)
    ctx.start()
    assert cluster_statuses(emulator) == ["Failed", "Idle"]


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


def test_unregistering_can_be_repeated(pc: ModuleType, emulator: RunningEmulator) -> None:
    ctx = compute_context(CLUSTER)
    for _ in range(2):
        unregister_manifest(ctx, "shop")
    assert emulator.state()["manifests"] == []


def test_the_clients_errors_are_told_apart(pc: ModuleType) -> None:
    with pytest.raises(not_found_error()):
        pc.ComputeContext(workspace="playground", name="nowhere")
    with pytest.raises(misspecified_error()):
        pc.ComputeContext(workspace="playground", name="shop", cpus=2)


def test_a_query_gives_its_id_and_its_context_and_is_listed(pc: ModuleType) -> None:
    ctx = compute_context(CLUSTER)
    uri = "s3://your-bucket/results/one.parquet"
    query: Any = pl.LazyFrame({"x": [1]}).remote(ctx).single_node().sink_parquet(uri)
    assert get_context(query) is ctx
    assert list(list_queries(ctx)) == [(get_query_id(query), uri)]
    assert connect_query(get_query_id(query), ctx).await_result().location == [uri]


def test_labels_are_added_to_a_copy(pc: ModuleType) -> None:
    for remote in (
        pl.LazyFrame().remote().labels(["mine"]),
        pl.LazyFrame().remote().labels(["mine"]).single_node(),
    ):
        assert with_labels(remote, ["ours"])._labels == ["mine", "ours"]
        assert remote._labels == ["mine"]


def test_the_destination_of_a_partitioned_sink_is_its_base_path(tmp_path: Path) -> None:
    assert get_destination("s3://your-bucket/x.csv") == "s3://your-bucket/x.csv"
    assert get_destination(pl.PartitionBy("s3://your-bucket/x/", key="x")) == "s3://your-bucket/x/"
    assert get_destination(pl.PartitionBy(tmp_path, key="x")) == str(tmp_path)


def test_the_pages_of_polars_cloud_have_an_address(pc: ModuleType) -> None:
    assert frontend_domain()
    assert "://" not in frontend_domain()


def test_nothing_of_the_client_is_imported_before_it_is_needed() -> None:
    tree = ast.parse(inspect.getsource(client_internals))
    imported = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("polars_cloud" in ast.unparse(node) for node in imported)
