"""A DAG that was copied into another deployment: read by Airflow there, run, and waited for."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag

import copy_dag
from local_airflow import ROOT
from polars_cloud_emulator.testing import RunningEmulator

LAYOUTS = [
    "AIRFLOW_HOME",
    "DAGs folder",
    "Astro project",
    "Astro project, no __init__.py",
    "Local bundle",
    "Bundle of a subfolder",
    "Git bundle",
    "Packaged zip",
    "MWAA",
    "Helm chart with git-sync",
]
WITHOUT_CLIENT = "Git bundle, no client"
OURS = sorted(file.stem for file in (ROOT / "dags").glob("*.py"))
TRIGGERS = Path("polars_remote", "waiting", "triggers.py")
LOCAL_BUNDLE = "airflow.dag_processing.bundles.local.LocalDagBundle"


@dataclass
class Deployment:
    """An AIRFLOW_HOME, what its environment says, and what its parts are expected to see.

    Attributes
    ----------
    bundles
        A folder by the name of each layout, with its DAGs; the first of these is run.
    path
        PYTHONPATH.
    triggers
        What holds the library that the triggerer imports; None if it finds none.
    has_client
        Whether DAGs can be run.
    """

    home: Path
    bundles: dict[str, tuple[Path, list[str]]]
    path: list[Path] = field(default_factory=list)
    triggers: Path | None = None
    has_client: bool = True

    def look(self, database: Path) -> dict[str, Any]:
        """What the parts of this deployment see, with a copy of the metadata database."""
        self.home.mkdir(parents=True, exist_ok=True)
        shutil.copy(database, self.home)
        config = [
            {"name": name, "classpath": LOCAL_BUNDLE, "kwargs": {"path": str(folder)}}
            for name, (folder, _) in self.bundles.items()
        ]
        environment = os.environ | {
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(self.home / "plugins"),
            "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(config),
            "PYTHONPATH": os.pathsep.join(map(str, self.path)),
        }
        script = [sys.executable, "-P", str(Path(__file__).with_name("one_deployment.py"))]
        if self.has_client:
            script += [word for name, (_, dags) in self.bundles.items() for word in (name, dags[0])]
        ran = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
        report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return report | {"log": ran.stdout}


def copied(dag_id: str, to: Path) -> tuple[Path, list[str]]:
    """Copy a DAG; the folder, with what Airflow is to find there."""
    to.mkdir(parents=True, exist_ok=True)
    copy_dag.main(dag_id, str(to))
    return to, [dag_id]


def folders_with_dags(folder: Path) -> Deployment:
    home = folder / "home"
    bundles = {
        "DAGs folder": copied("status_check", home / "dags"),
        "Local bundle": copied("single_query", folder / "etl"),
        "Bundle of a subfolder": copied("context_manager_shutdown", folder / "repository" / "etl"),
    }
    to_pack, dags = copied("manifest_reuse", folder / "to_pack")
    zip_bundle = folder / "packaged"
    shutil.make_archive(str(zip_bundle / "manifest_reuse"), "zip", to_pack)
    return Deployment(home, bundles | {"Packaged zip": (zip_bundle, dags)})


def airflow_home(folder: Path) -> Deployment:
    (folder / "dags").mkdir()
    (folder / "airflow.cfg").touch()
    copied("status_check", folder)
    return Deployment(
        folder,
        {"AIRFLOW_HOME": (folder / "dags", ["status_check"])},
        triggers=folder / "plugins",
    )


def mwaa(folder: Path) -> Deployment:
    bucket, home = folder / "bucket", folder / "home"
    for name in ("dags", "plugins"):
        (bucket / name).mkdir(parents=True)
    copied("manifest_reuse", bucket)
    plugins = shutil.make_archive(str(bucket / "plugins"), "zip", bucket / "plugins")
    shutil.unpack_archive(plugins, home / "plugins")
    shutil.copytree(bucket / "dags", home / "dags")
    return Deployment(
        home, {"MWAA": (home / "dags", ["manifest_reuse"])}, triggers=home / "plugins"
    )


def astro(folder: Path, name: str, dag_id: str, *, is_package: bool) -> Deployment:
    for part in ("dags", "include", "plugins"):
        (folder / part).mkdir()
    (folder / "include" / "settings.py").write_text("MINE = True\n")
    if is_package:
        (folder / "include" / "__init__.py").touch()
    (folder / "dags" / "mine.py").write_text(
        "from airflow.sdk import dag\n"
        "from include.settings import MINE\n"
        "@dag(schedule=None)\n"
        "def mine():\n"
        "    assert MINE\n"
        "mine()\n"
    )
    copied(dag_id, folder)
    assert (folder / "include" / "settings.py").read_text() == "MINE = True\n"
    assert (folder / "include" / "__init__.py").exists() == is_package
    return Deployment(
        folder,
        {name: (folder / "dags", [dag_id, "mine"])},
        path=[folder],
        triggers=folder / "plugins",
    )


def astro_package(folder: Path) -> Deployment:
    return astro(folder, "Astro project", "manifest_reuse", is_package=True)


def astro_without_init(folder: Path) -> Deployment:
    return astro(folder, "Astro project, no __init__.py", "single_query", is_package=False)


def git_sync(folder: Path) -> Deployment:
    commit = folder / "home" / "dags" / ".worktrees" / "4f1d2c"
    (commit / "dags").mkdir(parents=True)
    copied("status_check", commit)
    repository = folder / "home" / "dags" / "repo"
    repository.symlink_to(commit)
    return Deployment(
        folder / "home",
        {"Helm chart with git-sync": (repository / "dags", ["status_check"])},
        path=[repository],
        triggers=repository,
    )


def clone(folder: Path) -> Path:
    """A copy of this repository as Git would check it out."""
    made_here = (ROOT / ".gitignore").read_text().split()
    names = [line.strip("/") for line in made_here] + [".git"]
    return Path(shutil.copytree(ROOT, folder / "clone", ignore=shutil.ignore_patterns(*names)))


def git_bundle(folder: Path) -> Deployment:
    installed = folder / "site-packages"
    shutil.copytree(ROOT / "plugins" / "polars_remote", installed / "polars_remote")
    return Deployment(
        folder / "home",
        {"Git bundle": (clone(folder), OURS)},
        path=[installed],
        triggers=installed,
    )


def without_client(folder: Path) -> Deployment:
    for name in ("polars", "polars_cloud"):
        (folder / f"{name}.py").write_text('raise ImportError("not installed")\n')
    return Deployment(
        folder / "home",
        {WITHOUT_CLIENT: (clone(folder), OURS)},
        path=[folder, folder / "clone", folder / "clone" / "plugins"],
        triggers=folder / "clone" / "plugins",
        has_client=False,
    )


DEPLOYMENTS = (
    folders_with_dags,
    airflow_home,
    mwaa,
    astro_package,
    astro_without_init,
    git_sync,
    git_bundle,
    without_client,
)


Looks = dict[str, tuple[Deployment, Future[dict[str, Any]]]]


@pytest.fixture(scope="module")
def looks(
    polars_cloud_emulator_session: RunningEmulator,
    migrated_database: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Looks]:
    """Every deployment, and what its parts see, by the names of its layouts."""
    polars_cloud_emulator_session.reset()
    deployments = [build(tmp_path_factory.mktemp(build.__name__)) for build in DEPLOYMENTS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(deployment.look, migrated_database) for deployment in deployments]
        yield {
            name: (deployment, future)
            for deployment, future in zip(deployments, futures, strict=True)
            for name in deployment.bundles
        }
    polars_cloud_emulator_session.reset()


@pytest.mark.parametrize("layout", [*LAYOUTS, WITHOUT_CLIENT])
def test_airflow_reads_what_was_copied_and_nothing_else(looks: Looks, layout: str) -> None:
    deployment, future = looks[layout]
    report = future.result()
    assert report["errors"] == {}
    _, dags = deployment.bundles[layout]
    assert [dag for bundle, dag in report["dags"] if bundle == layout] == sorted(dags)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dag_runs_where_it_was_copied_to(looks: Looks, layout: str) -> None:
    _, future = looks[layout]
    report = future.result()
    assert report["runs"][layout] == "success", report["log"][-10000:]


@pytest.mark.parametrize("layout", [*LAYOUTS, WITHOUT_CLIENT])
def test_the_triggerer_imports_from_where_the_table_says(looks: Looks, layout: str) -> None:
    deployment, future = looks[layout]
    found = future.result()["triggers"]
    if deployment.triggers is None:
        assert found == "No module named 'polars_remote'"
    else:
        assert Path(found) == deployment.triggers / TRIGGERS


@pytest.mark.parametrize("layout", ["AIRFLOW_HOME", "MWAA"])
def test_helpers_among_the_plugins_are_not_taken_for_plugins(looks: Looks, layout: str) -> None:
    _, future = looks[layout]
    assert future.result()["plugins"] == []


def test_the_table_has_a_row_for_each_layout() -> None:
    text = (ROOT / "docs" / "layouts.md").read_text()
    rows = re.findall(r"^\| \*\*(.+?)\*\*", text, re.MULTILINE)
    assert rows == list(dict.fromkeys(layout.partition(",")[0] for layout in LAYOUTS))


def test_what_is_in_default_args_reaches_every_task_of_a_dag(tmp_path: Path) -> None:
    text = (ROOT / "dags" / "complete_pipeline.py").read_text()
    more = '"queue": "polars", "executor_config": {"pod_override": "image"}'
    text = text.replace("default_args={", f"default_args={{{more}, ")
    (tmp_path / "complete_pipeline.py").write_text(text)
    tasks = DagBag(tmp_path).dags["complete_pipeline"].tasks
    assert {"start_cluster", "stop_cluster", "build_report"} < {task.task_id for task in tasks}
    assert {task.queue for task in tasks} == {"polars"}
    assert all(task.executor_config == {"pod_override": "image"} for task in tasks)
