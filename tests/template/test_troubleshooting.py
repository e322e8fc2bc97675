"""docs/troubleshooting.md has a row for each error and warning of the helpers."""

import ast
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from local_airflow import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ROWS = [" ".join(row.split()) for row in re.findall(r"^- `([^`]+)`", PAGE, re.MULTILINE)]
ERRORS = ("Error", "Exception", "Timeout")
LOGS = {"logger.warning", "logger.error", "logger.exception"}
INSIDE_ANOTHER = {
    "cluster … has stopped",
    "it is still running",
    "query … has not ended",
    "query … is …",
    "… is not a key of the record",
    "module … has no attribute …",
}
"""Sentences that are a part of another one, or are meant for developers of the helpers."""


def helper_modules() -> list[Path]:
    folders = [ROOT / "include", ROOT / "plugins"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def sentences() -> Iterator[str]:
    for path in helper_modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = ast.unparse(node.func)
                if name.endswith(ERRORS) or name in LOGS:
                    yield from texts(node.args[0])
            elif isinstance(node, ast.Return) and node.value and path.name == "advice.py":
                yield from texts(node.value)


def texts(node: ast.expr) -> Iterator[str]:
    """Yield the possible values of a string expression, with `…` for its variable parts."""
    match node:
        case ast.Constant(value=str(text)):
            yield re.sub(r"%[sd]|%\.\df", "…", text)
        case ast.JoinedStr(values=parts):
            yield from map("".join, product(*map(list, map(texts, parts))))
        case ast.IfExp(body=one, orelse=other):
            yield from texts(one)
            yield from texts(other)
        case _:
            yield "…"


def pattern(sentence: str) -> str:
    return ".+".join(map(re.escape, sentence.split("…")))


SENTENCES = sorted({*sentences()} - INSIDE_ANOTHER - {"…"})


@pytest.mark.parametrize("sentence", SENTENCES)
def test_each_error_and_warning_of_the_helpers_has_a_row(sentence: str) -> None:
    assert any(re.fullmatch(pattern(sentence), row) for row in ROWS), sentence


@pytest.mark.parametrize("row", ROWS)
def test_each_row_explains_an_existing_error_or_warning(row: str) -> None:
    assert any(re.fullmatch(pattern(sentence), row) for sentence in SENTENCES), row


def test_errors_and_warnings_are_found() -> None:
    assert "Query failed: …" in SENTENCES
    assert any(sentence.startswith("The cluster may not use …: ") for sentence in SENTENCES)
    assert len(SENTENCES) > 40
