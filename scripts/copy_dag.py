"""Copy a DAG, with what it imports, into another Airflow, and say what is left to do there.

Usage: copy_dag.py DAG FOLDER. The folder is an AIRFLOW_HOME or a project, with `dags/` in it, or
else it is itself a DAGs folder or the root of a DAG bundle. No file is overwritten.
"""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from local_airflow import ROOT

SETTINGS_FILES = (".env", "Dockerfile", "docker-compose*.y*ml", "airflow_settings.yaml")
"""Where a project may set variables and Connections."""
CONNECTION = r"AIRFLOW_CONN_POLARS_CLOUD|conn_id: *\W?polars_cloud"
OLDEST_AIRFLOW = "3.1"
YOURS = "shop.py"
"""The one file in `include/` that is there to be edited."""


def find_folders(to: Path) -> tuple[Path, Path]:
    """Return where DAG files lie below a folder, and what holds the `include/` that they import.

    Raises
    ------
    SystemExit
        It cannot be told which `include/` Airflow would import.
    """
    if not (to / "dags").is_dir():
        for other in (to.parent / "include", to.parent / "plugins" / "include"):
            if to.name == "dags" and other.is_dir():
                sys.exit(
                    f"Nothing was copied: Airflow may import {other} in place of {to / 'include'}. "
                    f"Name the folder above: TO={to.parent}"
                )
        return to, to
    for home in (to, to / "plugins", to / "dags"):
        if (home / "include").is_dir():
            return to / "dags", home
    # Every part of Airflow imports from plugins/, and from the project only if it is told to.
    has_plugins = (to / "plugins").is_dir() or (to / "airflow.cfg").is_file()
    return to / "dags", to / "plugins" if has_plugins else to


def find_parts(dag_file: Path) -> dict[Path, set[str]]:
    """Return the files and folders in `include/` that a DAG needs, with the names it imports."""
    parts: dict[Path, set[str]] = {}
    left = [dag_file]
    while left:
        for node in ast.walk(ast.parse(left.pop().read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level:
                continue
            package, *modules = (node.module or "").split(".")
            if package == "include":
                part = ROOT / "include" / modules[0]
                part = part if part.is_dir() else part.with_suffix(".py")
                if part.is_file() and part not in parts:
                    left.append(part)
                parts.setdefault(part, set()).update(each.name for each in node.names)
    return parts


def find_copies(dag_file: Path, dags: Path, home: Path) -> dict[Path, Path]:
    """Return the files to copy, each with its place."""
    include = ROOT / "include"
    parts = find_parts(dag_file)
    files = [file for part in parts for file in (part, *part.rglob("*")) if file.is_file()]
    if not (home / "include").exists():
        files += [include / "__init__.py", include / ".airflowignore"]
    copies = {
        file: home / file.relative_to(ROOT) for file in files if "__pycache__" not in file.parts
    }
    # Whoever has edited it keeps it, as long as it has what the DAG imports.
    shop = include / YOURS
    if shop in copies and copies[shop].is_file():
        defined = re.findall(r"^(?:def )?(\w+)", copies[shop].read_text(), re.MULTILINE)
        if parts[shop] <= set(defined):
            del copies[shop]
    return {dag_file: dags / dag_file.name} | dict(sorted(copies.items()))


def check_copies(copies: dict[Path, Path]) -> None:
    """Check that no file would be overwritten.

    Raises
    ------
    SystemExit
        One would; with the names of all.
    """
    others = [
        place
        for file, place in copies.items()
        if place.exists() and (not place.is_file() or place.read_bytes() != file.read_bytes())
    ]
    if others:
        sys.exit(
            "Nothing was copied, as these exist with other content:\n"
            + "".join(f"  {place}\n" for place in others)
            + "Delete what is an older copy of this repository's, and copy again. Where it is "
            "yours, copy this repository's by hand, under another name, and change the import in "
            "the DAG file."
        )


def find_clashes(project: Path) -> Iterator[str]:
    """Say what in a project's requirements does not go with the DAG's."""
    needed = {
        requirement.name: requirement.specifier
        for requirement in [
            Requirement(f"apache-airflow>={OLDEST_AIRFLOW}"),
            Requirement(f"polars-cloud=={version('polars-cloud')}"),
            *map(Requirement, requires("polars-cloud") or ()),
        ]
    }
    named = set()
    for file in sorted([*project.glob("*.txt"), *project.glob("requirements/*.txt")]):
        for line in file.read_text().splitlines():
            try:
                theirs = Requirement(line.partition(" #")[0])
            except InvalidRequirement:
                continue  # an option, say
            name = canonicalize_name(theirs.name)
            named.add(name)
            if (ours := needed.get(name)) is None:
                continue
            pinned = [each.version for each in theirs.specifier if each.operator == "=="]
            tried = Version(pinned[0] if pinned else version(name))
            if tried not in ours or tried not in theirs.specifier:
                yield (
                    f"{file} has {theirs}, and the DAG needs {name}{ours}: docs/dependencies.md "
                    "says what to do."
                )
    if (project / "requirements.txt").is_file() and "polars-cloud" not in named:
        yield f"Add polars-cloud=={version('polars-cloud')} to {project / 'requirements.txt'}."


def find_tasks(to: Path, dag_file: Path, dags: Path, home: Path) -> Iterator[str]:
    """Say what is left to do before a DAG that was copied can run."""
    if home == dags:
        yield (
            f"The triggerer does not import from a DAGs folder: put {home} on its PYTHONPATH, or "
            "set POLARS_CLOUD_DEFER=0, and tasks wait in their workers."
        )
    elif home == to:
        yield (
            f"Put {home} on the PYTHONPATH of DAG processor, workers and triggerer, where it is "
            "not yet. With Astro it is."
        )
    settings = [file for pattern in SETTINGS_FILES for file in sorted(to.glob(pattern))]
    lines = [line for file in settings for line in file.read_text().splitlines()]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    shop = find_parts(dag_file).get(ROOT / "include" / YOURS)
    names = ["WORKSPACE"]
    if shop is not None:
        # Each variable in the shop's module is named like the environment variable.
        names += ["DATA", *sorted({"MANIFEST"} & shop)]
    missing = [f"POLARS_CLOUD_{name}" for name in names if f"POLARS_CLOUD_{name}" not in text]
    if missing:
        yield f"Set {', '.join(missing)} for DAG processor, workers and triggerer."
    if not re.search(CONNECTION, text):
        yield (
            "Make the Connection polars_cloud: type HTTP, login = client ID and password = client "
            "secret of a Polars Cloud service account."
        )
    yield from find_clashes(to)


def main(dag_id: str, folder: str) -> None:
    dag_file = ROOT / "dags" / f"{dag_id}.py"
    if not dag_file.is_file():
        names = ", ".join(sorted(file.stem for file in dag_file.parent.glob("*.py")))
        sys.exit(f"There is no DAG {dag_id!r}. There are {names}")
    to = Path(folder).resolve()
    if not to.is_dir():
        sys.exit(f"There is no folder {to}: make it, or name another")
    dags, home = find_folders(to)
    copies = find_copies(dag_file, dags, home)
    check_copies(copies)
    for file, place in copies.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    print(f"Copied {copies[dag_file]}, which imports from {home / 'include'}. Left to do:")
    for task in find_tasks(to, dag_file, dags, home):
        print(f"- {task}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
