"""Break one promise at a time in a copy of this repository, and list the breaks no test notices.

Usage: mutations.py [WORD...]. With words, only mutations whose promise or file contains one.
"""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from local_airflow import ROOT

LIST = ROOT / "tests" / "mutations.toml"
TEST_SECONDS = 240
"""Time limit of a test, in seconds. A test that hangs counts as having noticed the mutation."""
MADE = (".git", ".venv", ".airflow", ".emulator", ".*_cache", "__pycache__")
"""Folders that git or `make` creates. No test reads them."""


class MutationError(Exception):
    """The list of mutations is wrong, or tests fail without a mutation."""


@dataclass(frozen=True)
class Mutation:
    """A change that breaks a promise.

    Attributes
    ----------
    promise
        Sentence that the change makes untrue.
    file
        Path below the root.
    old, new
        Text that occurs once in the file, and its replacement.
    tests
        Files or ids of tests. At least one must fail.
    """

    promise: str
    file: str
    old: str
    tests: list[str]
    new: str = ""

    def apply(self, source: str) -> str:
        """Return the changed source.

        Raises
        ------
        MutationError
            The old text does not occur exactly once, or the result is not different, valid Python.
        """
        place = f"the entry '{self.promise}' in {LIST.relative_to(ROOT)}"
        if (count := source.count(self.old)) != 1:
            raise MutationError(
                f"{self.file} has the old text {count} times instead of once. Correct {place}:\n"
                f"{self.old}"
            )
        changed = source.replace(self.old, self.new)
        try:
            same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
        except SyntaxError as error:
            raise MutationError(
                f"The change is no valid Python ({error}). Correct {place}"
            ) from None
        if same:
            raise MutationError(f"The change changes nothing. Correct {place}")
        return changed


def read_mutations() -> list[Mutation]:
    return [Mutation(**entry) for entry in tomllib.loads(LIST.read_text())["mutation"]]


def tests_pass(tree: Path, tests: list[str], *options: str) -> bool:
    """Run tests in a copy until one fails; return whether all passed.

    Raises
    ------
    MutationError
        The tests did not run.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", f"--timeout={TEST_SECONDS}"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "emulator")]),
        # Python could use the bytecode of one mutation for the next.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    ran = subprocess.run(
        [*command, *options, *tests], cwd=tree, env=environment, capture_output=True, text=True
    )
    if ran.returncode not in (0, 1):
        raise MutationError(f"The tests did not run:\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
    return not ran.returncode


def main(words: list[str]) -> int:
    """Try the mutations; return 1 if one of them survives."""
    mutations = [
        each
        for each in read_mutations()
        if not words or any(word.lower() in f"{each.promise} {each.file}".lower() for word in words)
    ]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*MADE))
        print("Running the tests without a mutation", flush=True)
        if not tests_pass(tree, sorted({test for each in mutations for test in each.tests})):
            raise MutationError("Tests fail without a mutation: fix them first")
        for mutation in mutations:
            path = tree / mutation.file
            source = path.read_text()
            path.write_text(mutation.apply(source))
            began = time.monotonic()
            survived = tests_pass(tree, mutation.tests, "--numprocesses=0")
            path.write_text(source)
            survivors += [mutation] * survived
            outcome = "SURVIVED" if survived else "caught"
            seconds = time.monotonic() - began
            print(f"{outcome:8} {seconds:4.0f} s  {mutation.promise} ({mutation.file})", flush=True)
    print(f"\n{len(mutations) - len(survivors)} of {len(mutations)} mutations were caught")
    for each in survivors:
        print(f"No test noticed: {each.promise} ({each.file}, {', '.join(each.tests)})")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MutationError as error:
        sys.exit(str(error))
