"""`compat/variable_keys.py`: the record's keys, on an Airflow that cannot list Variables."""

import json
from collections.abc import Callable

import pytest
from airflow.sdk.execution_time import comms

from polars_remote.compat import variable_keys
from polars_remote.ownership import record
from polars_remote.ownership.record import ClusterUse, Owner, TaskRecord
from tests.tries import Supervisor

OWNER = Owner("shop", "manual__1", "run_query", -1)
OTHER = OWNER._replace(task_id="other")
TASKS = f"polars_cloud/task/{OWNER.run}/"
USERS = f"polars_cloud/cluster/{record.digest('shop')}/"


@pytest.fixture(autouse=True)
def lists_no_variables(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behave as an Airflow before 3.3."""
    monkeypatch.setattr(variable_keys, "LISTS_VARIABLES", False)


def use_key(owner: Owner) -> str:
    return ClusterUse(owner, "polars_cloud", "shop").key


def lists(supervisor: Supervisor) -> dict[str, list[str]]:
    return {
        name: json.loads(value)
        for name, value in supervisor.variables.items()
        if name.startswith(variable_keys.LISTS)
    }


def test_tries_tasks_and_users_are_found() -> None:
    tries = [record.task_key(OWNER, "1"), record.task_key(OWNER, "2")]
    of_other = record.task_key(OTHER, "3")
    used = use_key(OWNER)
    of_other_run = use_key(OWNER._replace(run_id="manual__2"))
    for key in (*tries, of_other, used, of_other_run):
        variable_keys.add(key)
    assert variable_keys.find(record.task_key(OWNER)) == tries
    assert set(variable_keys.find(TASKS)) == {*tries, of_other}
    assert set(variable_keys.find(USERS)) == {used, of_other_run}
    assert variable_keys.find("polars_cloud/cluster/", OWNER.run) == [used]


def test_no_list_is_left_when_its_last_key_is_removed(supervisor: Supervisor) -> None:
    keys = [record.task_key(OWNER, "1"), use_key(OWNER)]
    for key in keys:
        variable_keys.add(key)
    assert lists(supervisor)
    for key in keys:
        variable_keys.remove(key)
    assert lists(supervisor) == {}


def test_a_key_that_is_known_is_not_written_again(supervisor: Supervisor) -> None:
    variable_keys.add(record.task_key(OWNER, "1"))
    before = list(supervisor.variables.items())
    supervisor.variables = Unwritable(supervisor.variables)
    variable_keys.add(record.task_key(OWNER, "1"))
    assert list(supervisor.variables.items()) == before


class Unwritable(dict[str, str]):
    def __setitem__(self, key: str, value: str) -> None:
        raise AssertionError(f"{key} was written")


@pytest.mark.parametrize("change", [variable_keys.add, variable_keys.remove])
def test_what_another_writer_undoes_is_repeated(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], None]
) -> None:
    """Another task reads a list before this task writes it, and writes the list later."""
    key = use_key(OWNER)
    if change is variable_keys.remove:
        variable_keys.add(key)
    before = lists(supervisor)
    send = supervisor.send
    undone = set()

    def undo(message: object) -> object:
        answer = send(message)
        if (
            isinstance(message, comms.PutVariable | comms.DeleteVariable)
            and message.key not in undone
        ):
            undone.add(message.key)
            supervisor.variables[message.key] = json.dumps(before.get(message.key, []))
        return answer

    monkeypatch.setattr(supervisor, "send", undo)
    change(key)
    assert len(undone) == 2
    is_known = change is variable_keys.add
    assert variable_keys.find(USERS) == [key] * is_known
    assert variable_keys.find("polars_cloud/cluster/", OWNER.run) == [key] * is_known


def test_entries_that_are_written_and_erased_are_found_and_lost() -> None:
    use = ClusterUse(OWNER, "polars_cloud", "shop")
    task = record.task_key(OWNER, "1")
    record.put(task, TaskRecord(OWNER, "polars_cloud", cluster_uses=[use.key]))
    record.put(use.key, use)
    assert record.find_keys(TASKS) == [task]
    assert record.find_keys(record.cluster_prefix("shop")) == [use.key]
    assert record.find_keys(record.CLUSTERS, OWNER.run) == [use.key]
    for key in (task, use.key):
        record.erase(key)
    assert record.find_keys(TASKS) == []
    assert record.find_keys(record.CLUSTERS, OWNER.run) == []


def test_a_key_that_is_not_the_records_is_refused() -> None:
    with pytest.raises(ValueError, match="'polars_cloud/else' is not a key of the record"):
        variable_keys.add("polars_cloud/else")


@pytest.mark.parametrize("change", [variable_keys.add, variable_keys.remove])
def test_a_list_that_is_never_read_as_it_was_written_is_named(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], None]
) -> None:
    key = record.task_key(OWNER, "1")
    stays = [key] if change is variable_keys.remove else []
    monkeypatch.setattr(variable_keys, "_read", lambda name: list(stays))
    monkeypatch.setattr(variable_keys, "_let_others_write", lambda began: None)
    with pytest.raises(RuntimeError, match=r"Variable polars_cloud/keys/tries/\S+ was written 50"):
        change(key)
