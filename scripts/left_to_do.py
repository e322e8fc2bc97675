"""The steps that remain before a copied DAG can run in its new deployment."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from local_airflow import ROOT

SETTINGS_FILES = (
    ".env",
    "Dockerfile",
    "docker-compose*.y*ml",
    "airflow_settings.yaml",
    "startup.sh",
)
"""Files in which a project may set variables and Connections, and install packages."""
CONNECTION = r"AIRFLOW_CONN_POLARS_CLOUD|conn_id: *\W?polars_cloud"
CONSTRAINTS = re.compile(r"^(-c|--constraint)\b", re.MULTILINE)
OLDEST_AIRFLOW = "3.1"
PAGE = "docs/dependencies.md"
SHOP = ROOT / "include" / "shop.py"


@dataclass(frozen=True)
class Places:
    """Folders of a deployment.

    Attributes
    ----------
    dags
        Folder of the DAG files.
    include
        Parent of the folder `include` that the DAG files import.
    library
        Parent of the folder `polars_remote`.
    """

    dags: Path
    include: Path
    library: Path

    def get_place(self, file: Path) -> Path:
        """Return the path in the deployment of a file of this repository."""
        top, *rest = file.relative_to(ROOT).parts
        if top == "dags":
            return self.dags.joinpath(*rest)
        if top == "include":
            return self.include.joinpath(top, *rest)
        return self.library.joinpath(*rest)


def find_tasks(to: Path, modules: Mapping[Path, set[str]], places: Places) -> Iterator[str]:
    """Yield the steps that remain before a copied DAG can run.

    Parameters
    ----------
    to
        Folder that holds the deployment's files.
    modules
        Modules in `include/` that the DAG needs, with the names that it imports.
    places
        Folders into which the DAG and its imports were copied.
    """
    if places.library == places.dags:
        yield (
            f"The triggerer does not import from a DAGs folder: put {places.library} on its "
            "PYTHONPATH, or set POLARS_CLOUD_DEFER=0 for the workers, so that tasks wait there."
        )
    elif places.library == to and not (to / ".astro").is_dir():
        yield (
            f"Put {to}, or the folder to which it is deployed, on the PYTHONPATH of DAG processor, "
            "workers and triggerer, unless it is there already."
        )
    yield from find_former_library(places)
    lines = [line for file in find_settings(to) for line in file.read_text().splitlines()]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    names = ["WORKSPACE"]
    if SHOP in modules:
        # Each environment variable is named POLARS_CLOUD_ and the name in the shop's module.
        names += ["DATA", *sorted({"MANIFEST"} & modules[SHOP])]
    missing = [f"POLARS_CLOUD_{name}" for name in names if f"POLARS_CLOUD_{name}" not in text]
    if missing:
        yield f"Set {', '.join(missing)} for DAG processor, workers and triggerer."
    if not re.search(CONNECTION, text):
        yield (
            "Create the Connection polars_cloud: type HTTP, login = client ID and password = "
            "client secret of a Polars Cloud service account."
        )
    yield from find_packages(to, text)


def find_former_library(places: Places) -> Iterator[str]:
    """Yield what to change where earlier releases put the library."""
    former = places.include / "include" / "polars_remote"
    if not former.is_dir():
        return
    files = [*places.dags.glob("*.py"), *former.parent.glob("*.py")]
    users = [file for file in sorted(files) if "include.polars_remote" in file.read_text()]
    if users:
        yield (
            "Import polars_remote in place of include.polars_remote: "
            f"{', '.join(map(str, users))}. docs/upgrading.md lists what else has changed."
        )
    yield f"Delete {former} once no task is deferred and no file imports it."


def find_settings(project: Path) -> list[Path]:
    return [file for pattern in SETTINGS_FILES for file in sorted(project.glob(pattern))]


def find_packages(project: Path, settings: str) -> Iterator[str]:
    """Yield what to install, and which requirements of the project conflict with the DAG's."""
    client = f"polars-cloud=={version('polars-cloud')}"
    needed = {
        requirement.name: requirement.specifier
        for requirement in [
            Requirement(f"apache-airflow>={OLDEST_AIRFLOW}"),
            Requirement(client),
            *map(Requirement, requires("polars-cloud") or ()),
        ]
    }
    files = sorted([*project.glob("*.txt"), *project.glob("requirements/*.txt")])
    named = set()
    for file in files:
        for line in file.read_text().splitlines():
            try:
                theirs = Requirement(line.partition(" #")[0])
            except InvalidRequirement:
                continue  # for example, an option
            name = canonicalize_name(theirs.name)
            named.add(name)
            if (ours := needed.get(name)) is None:
                continue
            pinned = [each.version for each in theirs.specifier if each.operator == "=="]
            tried = Version(pinned[0] if pinned else version(name))
            if tried not in ours or tried not in theirs.specifier:
                yield f"{file} has {theirs}, but the DAG needs {name}{ours}: see {PAGE}."
    if "polars-cloud" in named or "polars-cloud" in settings:
        return
    requirements = project / "requirements.txt"
    if not requirements.is_file():
        yield (
            f"Install {client} where DAG processor, workers and triggerer run. Under Airflow's "
            f"constraints, see {PAGE}."
        )
    elif CONSTRAINTS.search(requirements.read_text()):
        yield (
            f"Add {client} to {requirements}. Its constraints pin another Polars: {PAGE} shows how "
            "to make a file without that pin."
        )
    else:
        yield f"Add {client} to {requirements}. Under Airflow's constraints, see {PAGE}."
