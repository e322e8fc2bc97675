"""A DAG that was copied into another deployment is parsed and run there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from airflow.dag_processing.dagbag import DagBag
from uv import find_uv_bin

import copy_dag
from local_airflow import ROOT
from polars_cloud_emulator.model.workspace import WORKSPACE
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
    "Google Managed Airflow",
    "Helm chart with git-sync",
]
WITHOUT_CLIENT = "Git bundle, no client"
OURS = sorted(file.stem for file in (ROOT / "dags").glob("*.py"))
TRIGGERS = Path("polars_remote", "waiting", "triggers.py")
CLIENT = f"polars-cloud=={version('polars-cloud')}"
CONNECTION = "AIRFLOW_CONN_POLARS_CLOUD"
VALUES = {
    "POLARS_CLOUD_WORKSPACE": WORKSPACE,
    "POLARS_CLOUD_DATA": "s3://your-bucket",
    "POLARS_CLOUD_MANIFEST": "in-a-layout",
}
LEFT_TO_SET = {CONNECTION, *VALUES}
"""Variables of this process that a deployment does not have."""
LOCAL_BUNDLE = "airflow.dag_processing.bundles.local.LocalDagBundle"


Step = Callable[["Deployment", re.Match[str]], None]
STEPS: dict[str, Step] = {}
"""Actions for the steps that the command prints, by the pattern of the sentence."""


def step(pattern: str) -> Callable[[Step], Step]:
    def register(function: Step) -> Step:
        STEPS[pattern] = function
        return function

    return register


@dataclass
class Deployment:
    """An AIRFLOW_HOME with its environment, and what its components are expected to find.

    It starts as an Airflow and nothing else. It sets and installs only what `make copy` prints as
    remaining steps.

    Attributes
    ----------
    bundles
        Folder and DAGs of each layout, by name. The first DAG is run.
    path
        PYTHONPATH.
    triggerer_path
        Further entries of the triggerer's PYTHONPATH.
    triggers
        Folder of the library that the triggerer imports; None if it finds none.
    has_client
        Whether the client is installed, so that DAGs can run.
    defers
        Whether to let the triggerer import the library, if the command offers a choice.
    settings
        File in which variables are set, and the prefix of its lines; None for the environment.
    deployed_to
        Where Airflow sees the folder, if it is not where it was copied to.
    variables
        Environment variables.
    installs
        Arguments of `uv pip install`, one call after the other.
    """

    home: Path
    bundles: dict[str, tuple[Path, list[str]]] = field(default_factory=dict)
    path: list[Path] = field(default_factory=list)
    triggerer_path: list[Path] = field(default_factory=list)
    triggers: Path | None = None
    has_client: bool = True
    defers: bool = False
    settings: tuple[Path, str] | None = None
    deployed_to: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)
    installs: list[tuple[str, ...]] = field(default_factory=list)

    def copy(self, dag_id: str, to: Path, *expected: str) -> tuple[Path, list[str]]:
        """Copy a DAG and do the remaining steps; return the folder, and what Airflow finds there.

        Parameters
        ----------
        expected
            First words of the remaining steps.
        """
        to.mkdir(parents=True, exist_ok=True)
        tasks = copy(dag_id, to)
        assert [task[: len(each)] for task, each in zip(tasks, expected, strict=True)] == [
            *expected
        ], tasks
        for task in tasks:
            [(function, found)] = [
                (function, found)
                for pattern, function in STEPS.items()
                if (found := re.fullmatch(pattern, task))
            ]
            function(self, found)
        if self.settings:
            assert copy(dag_id, to) == [], "nothing that is done already"
        return to, [dag_id]

    def set_variables(self, variables: Mapping[str, str]) -> None:
        self.variables |= variables
        if self.settings:
            file, before = self.settings
            with file.open("a") as lines:
                lines.writelines(f"{before}{name}='{each}'\n" for name, each in variables.items())

    def look(self, database: Path, python: Path) -> dict[str, Any]:
        """Return what the components of this deployment find, on a copy of the database."""
        self.home.mkdir(parents=True, exist_ok=True)
        shutil.copy(database, self.home)
        config = [
            {"name": name, "classpath": LOCAL_BUNDLE, "kwargs": {"path": str(folder)}}
            for name, (folder, _) in self.bundles.items()
        ]
        environment = {name: each for name, each in os.environ.items() if name not in LEFT_TO_SET}
        environment |= self.variables | {
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(self.home / "plugins"),
            "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(config),
            "PYTHONPATH": os.pathsep.join(map(str, self.path)),
            "TRIGGERER_PYTHONPATH": os.pathsep.join(map(str, self.triggerer_path)),
        }
        script = [python, "-P", str(Path(__file__).with_name("one_deployment.py"))]
        if self.has_client:
            script += [word for name, (_, dags) in self.bundles.items() for word in (name, dags[0])]
        ran = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]
        report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return report | {"log": ran.stdout}


def copy(dag_id: str, to: Path) -> list[str]:
    """Copy a DAG; return the remaining steps."""
    with redirect_stdout(StringIO()) as said:
        copy_dag.main(dag_id, str(to))
    _, _, tasks = said.getvalue().partition("Left to do:\n")
    return [line.removeprefix("- ") for line in tasks.splitlines()]


@step(
    r"The triggerer does not import from a DAGs folder: put (.+) on its PYTHONPATH, or set "
    r"(POLARS_CLOUD_DEFER)=(0) for the workers, so that tasks wait there\."
)
def choose_where_to_wait(deployment: Deployment, said: re.Match[str]) -> None:
    if deployment.defers:
        deployment.triggerer_path.append(Path(said[1]))
    else:
        deployment.set_variables({said[2]: said[3]})


@step(
    r"Put (.+), or the folder to which it is deployed, on the PYTHONPATH of DAG processor, workers "
    r"and triggerer, unless it is there already\."
)
def put_on_path(deployment: Deployment, said: re.Match[str]) -> None:
    deployment.path.append(deployment.deployed_to or Path(said[1]))


@step(r"Set (POLARS_CLOUD_\w+(?:, POLARS_CLOUD_\w+)*) for DAG processor, workers and triggerer\.")
def set_variables(deployment: Deployment, said: re.Match[str]) -> None:
    deployment.set_variables({name: VALUES[name] for name in said[1].split(", ")})


@step(
    r"Create the Connection polars_cloud: type HTTP, login = client ID and password = client "
    r"secret of a Polars Cloud service account\."
)
def make_connection(deployment: Deployment, said: re.Match[str]) -> None:
    account = urlsplit(os.environ[CONNECTION])
    connection = {"conn_type": "http", "login": account.username, "password": account.password}
    deployment.set_variables({CONNECTION: json.dumps(connection)})


@step(
    r"Install (\S+) where DAG processor, workers and triggerer run\. Under Airflow's constraints, "
    r"see docs/dependencies\.md\."
)
def install(deployment: Deployment, said: re.Match[str]) -> None:
    # All bundles share one environment.
    deployment.installs = [(said[1],)]


@step(r"Add (\S+) to (\S+)\. Under Airflow's constraints, see docs/dependencies\.md\.")
def add_to_requirements(deployment: Deployment, said: re.Match[str]) -> None:
    with open(said[2], "a") as requirements:
        requirements.write(f"{said[1]}\n")
    deployment.installs.append(("--requirement", said[2]))


@step(
    r"Add (\S+) to (\S+)\. Its constraints pin another Polars: docs/dependencies\.md shows how to "
    r"make a file without that pin\."
)
def add_to_constrained_requirements(deployment: Deployment, said: re.Match[str]) -> None:
    """Follow the page's steps for MWAA."""
    requirements = Path(said[2])
    theirs, ours = (
        requirements.with_name("theirs.cfg"),
        requirements.parent / "dags/constraints.txt",
    )
    page = (ROOT / "docs" / "dependencies.md").read_text()
    [command] = re.findall(r"\| *\n *(sed '\S+') > constraints\.txt$", page, re.MULTILINE)
    with theirs.open() as source, ours.open("w") as made:
        subprocess.run(shlex.split(command), stdin=source, stdout=made, check=True)
    before = requirements.read_text().splitlines()
    [theirs_line] = [line for line in before if line.startswith("--constraint")]
    # Without the steps of the page, it fails.
    deployment.installs.append(("--constraint", str(theirs), said[1]))
    others = [line for line in before if line != theirs_line]
    requirements.write_text("\n".join([f'--constraint "{ours}"', *others, said[1]]) + "\n")
    deployment.installs.append(("--requirement", str(requirements)))


@step(r"Restart Airflow: .+ is new, and Airflow does not import from it yet\.")
def restart(deployment: Deployment, said: re.Match[str]) -> None:
    """Do nothing: each component is started after this."""


IN_DAGS_FOLDER = (
    "The triggerer does not import",
    "Set POLARS_CLOUD_WORKSPACE, ",
    "Create",
    "Install",
)


def dags_folders(folder: Path) -> Deployment:
    deployment = Deployment(folder / "home")

    def copied(dag_id: str, to: Path) -> tuple[Path, list[str]]:
        return deployment.copy(dag_id, to, *IN_DAGS_FOLDER)

    deployment.bundles = {
        "DAGs folder": copied("status_check", folder / "home" / "dags"),
        "Bundle of a subfolder": copied("context_manager_shutdown", folder / "repository" / "etl"),
    }
    to_pack, dags = copied("manifest_reuse", folder / "to_pack")
    zip_bundle = folder / "packaged"
    shutil.make_archive(str(zip_bundle / "manifest_reuse"), "zip", to_pack)
    deployment.bundles["Packaged zip"] = (zip_bundle, dags)
    return deployment


def local_bundle(folder: Path) -> Deployment:
    deployment = Deployment(folder / "home", triggers=folder / "etl", defers=True)
    copied = deployment.copy("single_query", folder / "etl", *IN_DAGS_FOLDER)
    deployment.bundles = {"Local bundle": copied}
    return deployment


def airflow_home(folder: Path) -> Deployment:
    (folder / "dags").mkdir()
    (folder / "airflow.cfg").touch()
    deployment = Deployment(folder, triggers=folder / "plugins")
    expected = ("Restart Airflow", "Set POLARS_CLOUD_WORKSPACE, ", "Create", "Install")
    deployment.copy("status_check", folder, *expected)
    deployment.bundles = {"AIRFLOW_HOME": (folder / "dags", ["status_check"])}
    return deployment


def mwaa(folder: Path) -> Deployment:
    bucket, home = folder / "bucket", folder / "home"
    for name in ("dags", "plugins"):
        (bucket / name).mkdir(parents=True)
    (bucket / "startup.sh").touch()
    (bucket / "requirements.txt").write_text(
        "--constraint "
        '"https://raw.githubusercontent.com/apache/airflow/constraints-3.3.1/constraints-3.12.txt"\n'
        "tenacity\n"
    )
    (bucket / "theirs.cfg").write_text("polars==1.43.2\npolars-runtime-32==1.43.2\n")
    deployment = Deployment(
        home, triggers=home / "plugins", settings=(bucket / "startup.sh", "export ")
    )
    expected = ("Set POLARS_CLOUD_WORKSPACE, ", "Create", f"Add {CLIENT}")
    deployment.copy("manifest_reuse", bucket, *expected)
    plugins = shutil.make_archive(str(bucket / "plugins"), "zip", bucket / "plugins")
    shutil.unpack_archive(plugins, home / "plugins")
    shutil.copytree(bucket / "dags", home / "dags")
    deployment.bundles = {"MWAA": (home / "dags", ["manifest_reuse"])}
    return deployment


def google(folder: Path) -> Deployment:
    bucket, mounted = folder / "bucket", folder / "home" / "gcs"
    for name in ("dags", "plugins"):
        (bucket / name).mkdir(parents=True)
    deployment = Deployment(mounted, triggers=mounted / "plugins")
    expected = ("Set POLARS_CLOUD_WORKSPACE, ", "Create", "Install")
    deployment.copy("multi_stage", bucket, *expected)
    shutil.copytree(bucket, mounted)
    deployment.bundles = {"Google Managed Airflow": (mounted / "dags", ["multi_stage"])}
    return deployment


def astro(
    folder: Path, name: str, dag_id: str, *expected: str, is_package: bool, plugins: bool
) -> Deployment:
    for part in ("dags", "include", ".astro", *(["plugins"] if plugins else [])):
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
    (folder / "requirements.txt").touch()
    (folder / ".env").touch()
    triggers = folder / "plugins" if plugins else folder
    deployment = Deployment(
        folder, path=[folder], triggers=triggers, settings=(folder / ".env", "")
    )
    deployment.copy(dag_id, folder, *expected)
    assert (folder / "include" / "settings.py").read_text() == "MINE = True\n"
    assert (folder / "include" / "__init__.py").exists() == is_package
    deployment.bundles = {name: (folder / "dags", [dag_id, "mine"])}
    return deployment


IN_ASTRO = ("Set POLARS_CLOUD_WORKSPACE, ", "Create", "Add")


def astro_package(folder: Path) -> Deployment:
    return astro(
        folder, "Astro project", "manifest_reuse", *IN_ASTRO, is_package=True, plugins=True
    )


def astro_without_init(folder: Path) -> Deployment:
    return astro(
        folder,
        "Astro project, no __init__.py",
        "single_query",
        *IN_ASTRO,
        is_package=False,
        plugins=False,
    )


def git_sync(folder: Path) -> Deployment:
    repository, link = folder / "repository", folder / "home" / "dags" / "repo"
    (repository / "dags").mkdir(parents=True)
    deployment = Deployment(folder / "home", triggers=link, deployed_to=link)
    expected = ("Put", "Set POLARS_CLOUD_WORKSPACE, ", "Create", "Install")
    deployment.copy("status_check", repository, *expected)
    link.parent.mkdir(parents=True)
    link.symlink_to(shutil.copytree(repository, link.parent / ".worktrees" / "4f1d2c"))
    deployment.bundles = {"Helm chart with git-sync": (link / "dags", ["status_check"])}
    return deployment


def clone(folder: Path) -> Path:
    """Return a copy of this repository, as Git would check it out."""
    made_here = (ROOT / ".gitignore").read_text().split()
    names = [line.strip("/") for line in made_here] + [".git"]
    return Path(shutil.copytree(ROOT, folder / "clone", ignore=shutil.ignore_patterns(*names)))


def git_bundle(folder: Path) -> Deployment:
    """The wheel depends on the client."""
    checkout = clone(folder)
    uv("build", "--wheel", "--out-dir", str(folder), str(checkout / "plugins"))
    [wheel] = folder.glob("*.whl")
    deployment = Deployment(folder / "home", {"Git bundle": (checkout, OURS)})
    deployment.installs = [(str(wheel),)]
    deployment.set_variables(VALUES | {CONNECTION: os.environ[CONNECTION]})
    return deployment


def without_client(folder: Path) -> Deployment:
    checkout = clone(folder)
    return Deployment(
        folder / "home",
        {WITHOUT_CLIENT: (checkout, OURS)},
        path=[checkout, checkout / "plugins"],
        triggers=checkout / "plugins",
        has_client=False,
    )


def uv(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run uv with the cache of this repository's own installation."""
    # Python compiles what it imports, which is a third of Airflow.
    environment = os.environ | {
        "UV_CACHE_DIR": str(Path(sys.prefix, "cache")),
        "UV_COMPILE_BYTECODE": "0",
    }
    script = [find_uv_bin(), *arguments, "--quiet"]
    ran = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    if ran.returncode:
        raise UvError(ran.stderr)
    return ran


class UvError(Exception):
    """uv failed, with its output."""


def make_environment(folder: Path, installs: list[tuple[str, ...]]) -> Path:
    """Install an Airflow and the deployment's packages; return the Python."""
    uv("venv", "--python", sys.executable, str(folder))
    to = ("pip", "install", "--python", str(folder))
    airflow = ("apache-airflow", "apache-airflow-providers-standard")
    pins = [f"{name}=={version(name)}" for name in airflow]
    uv(*to, *pins, "--constraint", str(ROOT / "requirements-dev.lock"))
    for arguments in installs:
        if arguments[0] == "--constraint":
            with pytest.raises(UvError, match="unsatisfiable"):
                uv(*to, *arguments)
        else:
            uv(*to, *arguments)
    return folder / "bin" / "python"


DEPLOYMENTS = (
    dags_folders,
    local_bundle,
    airflow_home,
    mwaa,
    google,
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
    """Return each deployment and what its components find, by layout."""
    polars_cloud_emulator_session.reset()
    deployments = [build(tmp_path_factory.mktemp(build.__name__)) for build in DEPLOYMENTS]
    # Deployments with the same packages share an environment.
    pythons: dict[tuple[tuple[str, ...], ...], Path] = {}
    for deployment in deployments:
        key = get_installed(deployment)
        if key not in pythons:
            folder = tmp_path_factory.mktemp("environment")
            pythons[key] = make_environment(folder, deployment.installs)
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = [
            pool.submit(deployment.look, migrated_database, pythons[get_installed(deployment)])
            for deployment in deployments
        ]
        yield {
            name: (deployment, future)
            for deployment, future in zip(deployments, futures, strict=True)
            for name in deployment.bundles
        }
    polars_cloud_emulator_session.reset()


def get_installed(deployment: Deployment) -> tuple[tuple[str, ...], ...]:
    """Return a deployment's installations, with the lines of its requirements."""
    return tuple(
        (Path(words[1]).read_text().strip(),) if words[0] == "--requirement" else words
        for words in deployment.installs
    )


@pytest.mark.parametrize("layout", [*LAYOUTS, WITHOUT_CLIENT])
def test_airflow_parses_only_the_copied_dags(looks: Looks, layout: str) -> None:
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
    if layout == "Git bundle":
        assert found.endswith(f"site-packages/{TRIGGERS}")
    elif deployment.triggers is None:
        assert found == "No module named 'polars_remote'"
    else:
        assert Path(found) == deployment.triggers / TRIGGERS


@pytest.mark.parametrize("layout", ["AIRFLOW_HOME", "MWAA", "Google Managed Airflow"])
def test_a_library_in_the_plugins_folder_is_not_loaded_as_plugins(
    looks: Looks, layout: str
) -> None:
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
