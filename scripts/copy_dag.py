"""Copy a DAG and its imports into another Airflow, or upgrade an earlier copy.

FOLDER is an AIRFLOW_HOME or a project that contains `dags/`. Otherwise it is taken for a DAGs
folder or the root of a DAG bundle. Files that you have changed there are kept, and listed.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from left_to_do import Places, find_tasks
from local_airflow import ROOT, find_dag_file

LIBRARY = "polars_remote"
PACKAGE = ROOT / "plugins" / LIBRARY
NOTES = "copied.json"
"""File in the copied library with its version and the hash of each copied file."""


def find_places(to: Path) -> Places:
    """Return the folders of a deployment.

    Raises
    ------
    SystemExit
        Airflow may import another `include/` instead of the one beside the DAG.
    """
    if not (to / "dags").is_dir():
        for other in (to.parent / "include", to.parent / "plugins" / "include"):
            if to.name == "dags" and other.is_dir():
                sys.exit(
                    f"Nothing was copied: Airflow may import {other} in place of {to / 'include'}. "
                    f"Name the parent folder instead: TO={to.parent}"
                )
        return Places(to, to, to)
    # Every component of Airflow imports from plugins/. The project must be on the PYTHONPATH first.
    has_plugins = (to / "plugins").is_dir() or (to / "airflow.cfg").is_file()
    default = to / "plugins" if has_plugins else to

    def find(folder: str) -> Path:
        parents = (to, to / "plugins", to / "dags")
        return next((parent for parent in parents if (parent / folder).is_dir()), default)

    return Places(to / "dags", find("include"), find(LIBRARY))


def find_modules(dag_file: Path) -> dict[Path, set[str]]:
    """Return the modules in `include/` that a DAG needs, with the names that they provide."""
    modules: dict[Path, set[str]] = {}
    left = [dag_file]
    while left:
        for node in ast.walk(ast.parse(left.pop().read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level:
                continue
            package, *names = (node.module or "").split(".")
            if package == "include":
                module = ROOT / "include" / f"{names[0]}.py"
                if module not in modules:
                    left.append(module)
                modules.setdefault(module, set()).update(each.name for each in node.names)
    return modules


@dataclass
class Plan:
    """Files of a deployment to write, keep or delete.

    Attributes
    ----------
    write, keep
        Source in this repository by file.
    delete
        Files.
    """

    write: dict[Path, Path] = field(default_factory=dict)
    keep: dict[Path, Path] = field(default_factory=dict)
    delete: list[Path] = field(default_factory=list)


class Copied:
    """Files that were copied into a deployment before, read from the notes in the library's folder.

    A file without a hash in the notes counts as unchanged if a commit of this repository has the
    same content.

    Attributes
    ----------
    has_library
        Whether the deployment has a library already, also where early releases put it.
    """

    def __init__(self, places: Places) -> None:
        self._folder = places.library
        self.notes = places.library / LIBRARY / NOTES
        libraries = (places.library / LIBRARY, places.include / "include" / LIBRARY)
        self.has_library = any(folder.is_dir() for folder in libraries)
        # Early releases left no notes.
        self._has_notes = self.notes.is_file()
        try:
            notes = json.loads(self.notes.read_text()) if self._has_notes else {}
        except ValueError as error:
            sys.exit(
                f"Nothing was copied: {self.notes} is damaged ({error}). Restore it, or delete it: "
                "then every file that no commit of this repository has is kept"
            )
        self.version: str | None = notes.get("version")
        self._hashes: dict[str, str] = notes.get("sha256", {})

    def has(self, place: Path) -> bool:
        """Return whether the file was copied, as far as the notes show."""
        return self.is_noted(place) if self._has_notes else self.has_library

    def is_noted(self, place: Path) -> bool:
        return self._name(place) in self._hashes

    def is_unchanged(self, place: Path) -> bool:
        """Return whether the file is unchanged since it was copied."""
        noted = self._hashes.get(self._name(place))
        return get_hash(place) == noted if noted else is_known_to_git(place)

    def list_places(self) -> list[Path]:
        """Return the files in the notes, and all others in the library's folder."""
        noted = [Path(os.path.normpath(self._folder / name)) for name in self._hashes]
        return sorted({*noted, *list_files(self._folder / LIBRARY)} - {self.notes})

    def get_notes(self, plan: Plan) -> bytes:
        """Return the content of the notes after the plan is carried out."""
        gone = {self._name(place) for place in plan.delete}
        hashes = {name: each for name, each in self._hashes.items() if name not in gone}
        # A file that was changed before there were notes is noted as a copy without a hash.
        hashes = {self._name(place): "" for place in plan.keep} | hashes
        hashes |= {self._name(place): get_hash(file) for place, file in plan.write.items()}
        notes = {"version": get_version(), "sha256": dict(sorted(hashes.items()))}
        return (json.dumps(notes, indent=1) + "\n").encode()

    def _name(self, place: Path) -> str:
        return Path(os.path.relpath(place, self._folder)).as_posix()


def plan_copy(dag_file: Path, places: Places, copied: Copied) -> Plan:
    """Return the plan: write the files that the DAG needs and unchanged copies, keep changed files.

    Raises
    ------
    SystemExit
        A file of the user's own is in the way of one that the DAG needs, or lacks a name that the
        DAG imports; or a folder is in the way.
    """
    include = ROOT / "include"
    needed = [dag_file, *find_modules(dag_file), *list_files(PACKAGE)]
    # If the user has an `include/` already, do not add these two.
    is_new = not (places.include / "include").exists()
    for file in (include / "__init__.py", include / ".airflowignore"):
        if is_new or copied.is_noted(places.get_place(file)):
            needed.append(file)
    others = {*(ROOT / "dags").glob("*.py"), *include.glob("*.py")} - {include / "__init__.py"}
    plan = Plan()
    for file in sorted({*needed, *others}):
        place = places.get_place(file)
        if not place.exists():
            if file in needed:
                plan.write[place] = file
        elif place.is_dir():
            if file in needed or copied.has(place):
                sys.exit(
                    f"Nothing was copied: {place} is a folder, but {file.relative_to(ROOT)} must "
                    "be copied there. Rename the folder, and copy again"
                )
        elif place.samefile(file):
            sys.exit(f"Nothing was copied: {place} is this repository's own file. Change TO")
        elif is_same(place, file) or copied.is_unchanged(place):
            plan.write[place] = file
        elif file in needed or copied.has(place):
            plan.keep[place] = file
    plan.delete = [
        place
        for place in copied.list_places()
        if place not in {*plan.write, *plan.keep} and place.is_file() and copied.is_unchanged(place)
    ]
    dag = places.get_place(dag_file)
    if dag in plan.keep and not copied.has(dag):
        sys.exit(
            f"Nothing was copied: {dag} is a file of your own. Rename it, or copy "
            f"{dag_file.relative_to(ROOT)} by hand under another name"
        )
    for file in plan.write.values():
        if file.suffix == ".py" and LIBRARY not in file.parts:
            check_imports(file, places, plan)
    return plan


def check_imports(file: Path, places: Places, plan: Plan) -> None:
    """Check that the kept modules define the names that a file imports.

    Raises
    ------
    SystemExit
        Names are missing; the message lists them.
    """
    for module, names in find_modules(file).items():
        place = places.get_place(module)
        if place not in plan.keep:
            continue
        defined = re.findall(r"^(?:def )?(\w+)", read_text(place), re.MULTILINE)
        if missing := sorted(names - set(defined)):
            sys.exit(
                f"Nothing was copied: {place} was changed there and lacks {', '.join(missing)}, "
                f"which {file.relative_to(ROOT)} imports. Add it from "
                f"{module.relative_to(ROOT)}, and copy again"
            )


def get_version() -> str:
    """Return the library's version without importing the library, which would import Airflow."""
    [version] = re.findall(r'^__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(), re.M)
    return str(version)


def list_files(folder: Path) -> list[Path]:
    files = folder.rglob("*")
    return sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts)


def read_text(file: Path) -> str:
    """Return the text of a file, which may not be UTF-8."""
    return file.read_text(encoding="utf-8", errors="replace")


def get_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def is_known_to_git(file: Path) -> bool:
    """Return whether a commit of this repository has a file with the same content."""

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)

    blob = git("hash-object", "--no-filters", str(file.resolve()))
    return not blob.returncode and not git("cat-file", "-e", blob.stdout.strip()).returncode


def carry_out(plan: Plan, copied: Copied) -> None:
    """Write each file under a temporary name, rename all of them, and write the notes.

    Raises
    ------
    SystemExit
        A file cannot be written. New files and folders are removed unless files were renamed.
    """
    contents = {place: file.read_bytes() for place, file in plan.write.items()}
    contents[copied.notes] = copied.get_notes(plan)
    # Keep symbolic links: replace the file that a link points to.
    contents = {Path(os.path.realpath(place)): each for place, each in contents.items()}
    parts = {place: place.with_name(f".{place.name}.part") for place in contents}
    made: list[Path] = []
    outcome = "Nothing was copied"
    try:
        for place, part in parts.items():
            for folder in reversed(place.parents):
                if not folder.exists():
                    folder.mkdir()
                    made.append(folder)
            part.write_bytes(contents[place])
            if place.exists():
                shutil.copymode(place, part)
        outcome = "Not everything was copied"
        # Renaming is atomic: Airflow may read a file at any time.
        for place, part in parts.items():
            part.replace(place)
        for place in plan.delete:
            place.unlink()
    except BaseException as error:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            sys.exit(f"{outcome}: {error}. Make the folder writable, and copy again")
        raise


def show_difference(place: Path, file: Path) -> str:
    """Return the diff between this repository's file and the deployment's."""
    ours, theirs = (read_text(each).splitlines(keepends=True) for each in (file, place))
    return "".join(difflib.unified_diff(ours, theirs, str(file.relative_to(ROOT)), str(place)))


def find_restarts(plan: Plan, places: Places) -> Iterator[str]:
    """Yield a line for each part of Airflow that must be restarted to see the new files."""
    changed = [*plan.delete, *(p for p, file in plan.write.items() if not is_same(p, file))]
    library = places.library / LIBRARY
    if not places.library.is_dir():
        yield f"Restart Airflow: {places.library} is new, and Airflow does not import from it yet."
    elif library.is_dir() and any(place.is_relative_to(library) for place in changed):
        yield "Restart the triggerer: it still runs the library that it imported before."


def is_same(place: Path, file: Path) -> bool:
    return place.is_file() and place.read_bytes() == file.read_bytes()


def main(dag_id: str, folder: str, *, diff: bool = False) -> None:
    dag_file = find_dag_file(dag_id)
    to = Path(folder).resolve()
    if not to.is_dir():
        sys.exit(f"There is no folder {to}. Create it, or name another")
    places = find_places(to)
    copied = Copied(places)
    plan = plan_copy(dag_file, places, copied)
    restarts = list(find_restarts(plan, places))
    carry_out(plan, copied)
    dag = places.get_place(dag_file)
    what = f"the imports of {dag}:" if dag in plan.keep else f"{dag}, which imports"
    print(f"Copied {what} {places.library / LIBRARY}, version {get_version()}.")
    if copied.version not in (None, get_version()):
        print(f"The version before was {copied.version}.")
    for place, file in plan.keep.items():
        print(f"Kept {place}, because you have changed it{'' if diff else ': DIFF=1 shows how'}.")
        if diff:
            print(show_difference(place, file))
    tasks = [*restarts, *find_tasks(to, find_modules(dag_file), places)]
    print("Left to do:" if tasks else "Nothing is left to do.")
    for task in tasks:
        print(f"- {task}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dag", metavar="DAG")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--diff", action="store_true", help="show how the kept files differ")
    arguments = parser.parse_args()
    main(arguments.dag, arguments.folder, diff=arguments.diff)
