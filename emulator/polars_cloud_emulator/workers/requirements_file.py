"""The lines of a requirements file, as pip reads them and as pip-compile and uv write them.

https://pip.pypa.io/en/stable/reference/requirements-file-format/
"""

import argparse
import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import NoReturn

from packaging.requirements import InvalidRequirement, Requirement

from polars_cloud_emulator.model.errors import InvalidRequest

COMMENT = re.compile(r"(^|\s+)#.*$")
HASH = r"(sha256|sha384|sha512):[0-9a-f]+"
ELSEWHERE = ("-r", "--requirement", "-c", "--constraint", "-e", "--editable")
"""Options that name a file, a folder or a repository."""
NAME_IT = "the emulator installs nothing, and takes a name and versions, a line each"
LONGEST_LINE = 200
"""Characters of a line that a refusal quotes."""
CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+(?=@)")


def requirements_in(text: str) -> list[Requirement]:
    """What a requirements file asks for on this Python.

    Options that choose an index or a kind of file have no effect where nothing is installed.

    Raises
    ------
    InvalidRequest
        A line is no requirement, names a file or an address, or lacks its hash.
    """
    requirements = []
    without_hash = []
    wants_hashes = False
    for line in _logical_lines(text):
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise _refusal(line, f"is not understood: {error}") from None
        if words[0].partition("=")[0] in ELSEWHERE:
            raise _refusal(line, "names what a cluster does not have; write what it asks for")
        if words[0].startswith("-"):
            wants_hashes |= _FILE_OPTIONS.of(line, words).require_hashes
            continue
        # As pip, which takes a marker's quotes as they are.
        asked, *options = re.split(r"\s(?=-)", line, maxsplit=1)
        requirement = _requirement(line, asked)
        hashes = _HASHES.of(line, shlex.split(options[0]) if options else []).hash
        for each in hashes:
            if re.fullmatch(HASH, each) is None:
                raise _refusal(line, f"has no SHA-256, SHA-384 or SHA-512 hash in '{each}'")
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirements.append(requirement)
        wants_hashes |= bool(hashes)
        if not hashes or not _is_pinned(requirement):
            without_hash.append(line)
    if wants_hashes and without_hash:
        raise _refusal(
            without_hash[0], "has no version after '==' or no hash; with one hash, pip wants all"
        )
    return requirements


def _logical_lines(text: str) -> Iterator[str]:
    """Lines without comments, those joined that end in a backslash."""
    begun = ""
    for line in text.removeprefix("\ufeff").splitlines():
        if line.endswith("\\") and COMMENT.match(line) is None:
            begun += line.rstrip("\\")
            continue
        whole = COMMENT.sub("", f"{begun} {line}" if begun else line).strip()
        begun = ""
        if whole:
            yield whole
    if begun.strip():
        yield begun.strip()


def _requirement(line: str, asked: str) -> Requirement:
    try:
        requirement = Requirement(asked)
    except InvalidRequirement:
        if "/" in asked or asked.endswith((".whl", ".tar.gz", ".zip")):
            problem = f"names a file or an address; {NAME_IT}"
        else:
            problem = f"is not understood; {NAME_IT}"
        raise _refusal(line, problem) from None
    if requirement.url is not None:
        raise _refusal(line, f"names a file or an address; {NAME_IT}")
    return requirement


def _is_pinned(requirement: Requirement) -> bool:
    return any(
        each.operator in {"==", "==="} and not each.version.endswith("*")
        for each in requirement.specifier
    )


def _refusal(line: str, problem: str) -> InvalidRequest:
    shown = textwrap.shorten(CREDENTIALS.sub("***", line), LONGEST_LINE, placeholder=" …")
    return InvalidRequest(f"the requirement '{shown}' {problem}")


class _Options(argparse.ArgumentParser):
    """Options of a line."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def of(self, line: str, words: list[str]) -> argparse.Namespace:
        self._line = line
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        raise _refusal(self._line, f"is not understood: {message}")


_FILE_OPTIONS = _Options()
for _names in (
    ("-i", "--index-url"),
    ("--extra-index-url",),
    ("-f", "--find-links"),
    ("--trusted-host",),
    ("--no-binary",),
    ("--only-binary",),
):
    _FILE_OPTIONS.add_argument(*_names)
for _name in ("--no-index", "--prefer-binary", "--pre", "--require-hashes"):
    _FILE_OPTIONS.add_argument(_name, action="store_true")
_HASHES = _Options()
_HASHES.add_argument("--hash", action="append", default=[])
