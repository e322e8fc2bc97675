"""Each mutation can be applied to the code, so that `make test-mutations` can try it."""

import pytest

from local_airflow import ROOT
from mutations import Mutation, MutationError, read_mutations

MUTATIONS = read_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: f"{each.file}: {each.promise}")
def test_a_mutation_can_be_applied_and_its_tests_exist(mutation: Mutation) -> None:
    mutation.apply((ROOT / mutation.file).read_text())
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("[")[0].partition("::")
        source = (ROOT / file).read_text()
        assert not name or f"\ndef {name}(" in source, test


def test_a_promise_is_in_the_list_once_for_each_change() -> None:
    changes = [(each.file, each.old, each.new) for each in MUTATIONS]
    assert len(changes) == len(set(changes)) > 60


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("a = 2\n", "has the old text 0 times instead of once"),
        ("a = 1\nb = 1\n", "has the old text 2 times instead of once"),
        ("a = 1\n", "is no valid Python"),
        ("# 1\n", "changes nothing"),
    ],
)
def test_a_mutation_that_cannot_be_applied_is_a_clear_error(source: str, problem: str) -> None:
    mutation = Mutation("One is one", "one.py", old="1", new="", tests=["test_one.py"])
    with pytest.raises(MutationError, match=f"{problem}.*'One is one' in tests/mutations.toml"):
        mutation.apply(source)
