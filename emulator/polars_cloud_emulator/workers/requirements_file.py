"""Parser of requirements files in pip's format, as written by hand, pip-compile or uv.

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
"""Options that refer to a file, a folder or a repository."""
NAME_IT = "the emulator installs nothing; write one name with versions per line"
LONGEST_LINE = 200
"""Maximum characters of a line in an error."""
CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+(?=@)")


def requirements_in(text: str) -> list[Requirement]:
    """Return the requirements in a file that apply to this Python.

    Options for an index or a kind of distribution are ignored, because nothing is installed.

    Raises
    ------
    InvalidRequest
        A line is not a requirement, refers to a file or a URL, or has no hash while others do.
    """
    requirements = []
    without_hash = []
    wants_hashes = False
    for line in _logical_lines(text):
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise _refusal(line, f"cannot be parsed: {error}") from None
        if words[0].partition("=")[0] in ELSEWHERE:
            raise _refusal(
                line,
                "refers to something that a cluster does not have; write its requirements instead",
            )
        if words[0].startswith("-"):
            wants_hashes |= _FILE_OPTIONS.of(line, words).require_hashes
            continue
        # Like pip, without shell quoting, because a marker contains quotes.
        asked, *options = re.split(r"\s(?=-)", line, maxsplit=1)
        requirement = _requirement(line, asked)
        hashes = _HASHES.of(line, shlex.split(options[0]) if options else []).hash
        for each in hashes:
            if re.fullmatch(HASH, each) is None:
                raise _refusal(line, f"needs a SHA-256, SHA-384 or SHA-512 hash, not '{each}'")
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirements.append(requirement)
        wants_hashes |= bool(hashes)
        if not hashes or not _is_pinned(requirement):
            without_hash.append(line)
    if wants_hashes and without_hash:
        raise _refusal(
            without_hash[0],
            "has no version after '==' or no hash; if one line has a hash, pip requires all to",
        )
    return requirements


def _logical_lines(text: str) -> Iterator[str]:
    """Yield the lines without comments; a line that ends in a backslash continues in the next."""
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
            problem = f"refers to a file or a URL; {NAME_IT}"
        else:
            problem = f"cannot be parsed; {NAME_IT}"
        raise _refusal(line, problem) from None
    if requirement.url is not None:
        raise _refusal(line, f"refers to a file or a URL; {NAME_IT}")
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
    """Parser of the options in a line."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def of(self, line: str, words: list[str]) -> argparse.Namespace:
        self._line = line
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        raise _refusal(self._line, f"cannot be parsed: {message}")


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
