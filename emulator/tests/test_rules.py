"""Each rule in the README names a test that exists."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
README = (HERE.parent / "README.md").read_text()
RULES = re.findall(r"^\| (.*) \| (client|observed|own) \| `(test_\w+)` \|$", README, re.M)
TESTS = {
    name
    for path in HERE.glob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
}


@pytest.mark.parametrize(("rule", "source", "test"), RULES, ids=[test for *_, test in RULES])
def test_rule_has_the_test_that_it_names(rule: str, source: str, test: str) -> None:
    assert test in TESTS, rule


def test_every_rule_of_the_table_is_found() -> None:
    _, _, table = README.partition("\n## The rules\n")
    rows = table.partition("\n## ")[0].count("` |\n")
    assert len(RULES) == rows > 20
