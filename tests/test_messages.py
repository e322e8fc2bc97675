"""Log lines, errors and printed lines: an address stands last and alone.

Airflow's log view makes a link of an address and of each `)`, `.`, `,` or `'` behind it.
"""

import ast
import re
from collections.abc import Iterator
from itertools import product

import pytest

from local_airflow import ROOT

FOLDERS = ("compose", "dags", "emulator/polars_cloud_emulator", "include", "plugins", "scripts")
LOGS = re.compile(r"logger\.(debug|info|warning|error|exception)")
PRINTS = re.compile(r"(.*\.)?print|.*(Error|Exception|Timeout|Exit)|sys\.exit|.*\.exit|[A-Z]\w+")
"""Calls whose text a person reads; each class of the emulator's errors among them."""
PLACEHOLDER = re.compile(r"%(?:[sdr]|\.\df)")
ADDRESS = re.compile(
    r"(describe|get_page)\((query|found)\)|.*\.page|.*\['page'\]|.*\.(rest_|endpoint_)?url|url|own|.*_address"
)
"""Expressions that are an address, or text that ends with one."""


def messages() -> Iterator[tuple[str, str]]:
    """Yield place and text of each message, with `http://a` for an address that is filled in."""
    for path in sorted(each for folder in FOLDERS for each in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and node.args:
                name = ast.unparse(node.func)
                if LOGS.fullmatch(name):
                    for text in texts(node.args[0]):
                        yield place, filled(text, node.args[1:])
                elif PRINTS.fullmatch(name):
                    yield from ((place, text) for each in node.args for text in texts(each))
            elif isinstance(node, ast.Return | ast.Assign | ast.AugAssign) and node.value:
                yield from ((place, text) for text in texts(node.value))


def texts(node: ast.expr) -> Iterator[str]:
    """Yield what an expression may read."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield from map("".join, product(*map(list, map(texts, parts))))
        case ast.FormattedValue(value=value):
            yield from texts(value)
        case ast.IfExp(body=one, orelse=other):
            yield from texts(one)
            yield from texts(other)
        case ast.Call(func=ast.Attribute(value=ast.JoinedStr() as text, attr="rstrip")):
            yield from texts(text)
        case _:
            yield "http://a" if ADDRESS.fullmatch(ast.unparse(node)) else "…"


def filled(text: str, arguments: list[ast.expr]) -> str:
    """Return the log line with its arguments."""
    values = iter([next(texts(each)) for each in arguments])
    return PLACEHOLDER.sub(lambda _: next(values, "…"), text)


def is_followed(text: str) -> bool:
    """Return whether an address in the text has something behind it, or a bracket around it."""
    found = re.search(r"https?://[\w…]\S*", text)
    if not found:
        return False
    before, after = text[: found.start()][-1:], text[found.end() :].strip()
    return bool(after or found[0][-1] in ".,;:!?)]}>'\"" or before not in ("", " ", "\n"))


MESSAGES = sorted({*messages()})


def test_an_address_stands_last_and_alone() -> None:
    assert [f"{place}: {text}" for place, text in MESSAGES if is_followed(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "Submitted query http://a",
        "Page with the clusters, until Ctrl-C: http://a",
    ],
)
def test_messages_with_an_address_are_found(text: str) -> None:
    assert any(text in each for _, each in MESSAGES), text


@pytest.mark.parametrize(
    "text", ["at http://a, until", "(http://a)", "see http://a.", "'http://a'", "http://a is there"]
)
def test_an_address_with_something_behind_it_is_seen(text: str) -> None:
    assert is_followed(text)
