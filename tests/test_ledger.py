"""`ledger.py`: who owns which query and which cluster is on record, for everybody to see."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socketpair
from threading import Event, Thread
from typing import Any

import msgspec
import pytest
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.supervisor import set_supervisor_comms

from include.polars_remote import ledger, variable_keys
from include.polars_remote.ledger import Owner
from tests.tries import StartTry, Supervisor

OWNER = Owner("shop", "manual__1", "run_query", -1)
RUN = OWNER._replace(task_id="start_cluster", whole_run=True)


@pytest.fixture(
    params=[
        pytest.param(True, id="airflow-lists-variables"),
        pytest.param(False, id="airflow-lists-no-variables"),
    ],
    autouse=True,
)
def lists_variables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Airflow does from 3.3 on, and as it did before."""
    monkeypatch.setattr(variable_keys, "LISTS_VARIABLES", request.param)


def use(owner: Owner, manifest: str = "shop") -> str:
    key = ledger.cluster_key(manifest, owner)
    ledger.put(key, owner, {"manifest": manifest, "conn_id": "polars_cloud"})
    return key


# Entries


@pytest.mark.usefixtures("supervisor")
def test_an_entry_is_what_was_written_last_until_it_is_erased() -> None:
    key = ledger.task_key(OWNER, "1")
    assert ledger.get(key) is None
    for uri in ("s3://bucket/one", "s3://bucket/two"):
        ledger.put(key, OWNER, {"queries": {uri: {}}})
    entry = ledger.get(key)
    assert entry is not None
    owner, value = entry
    assert owner == OWNER
    assert value["queries"] == {"s3://bucket/two": {}}
    ledger.erase(key)
    assert ledger.get(key) is None


@pytest.mark.usefixtures("supervisor")
def test_erasing_what_is_gone_is_no_error() -> None:
    ledger.erase(ledger.task_key(OWNER, "1"))


@pytest.mark.parametrize("map_index", [-1, 0, 7])
def test_the_owner_is_the_task_that_runs(start_try: StartTry, map_index: int) -> None:
    with start_try(scope=False, map_index=map_index):
        assert Owner.current() == OWNER._replace(map_index=map_index)
        assert Owner.current(whole_run=True).whole_run


def test_keys_fit_into_airflow_and_show_no_name_that_looks_like_a_secrets() -> None:
    long = Owner("secret_" * 40, "manual__password", "api_token" * 30, 12_345)
    for key in (
        ledger.task_key(long, "123e4567-e89b-12d3-a456-426614174000"),
        ledger.cluster_key("access_key" * 30, long),
    ):
        assert len(key) <= 250
        assert not any(name in key for name in ("secret", "password", "token", "access_key"))


@pytest.mark.parametrize(
    "other",
    [
        {"dag_id": "other"},
        {"run_id": "manual__2"},
        {"task_id": "other"},
        {"map_index": 0},
        {"whole_run": True},
    ],
)
def test_keys_of_different_owners_differ(other: dict[str, Any]) -> None:
    assert ledger.task_key(OWNER) != ledger.task_key(OWNER._replace(**other))
    assert ledger.cluster_key("shop", OWNER) != ledger.cluster_key("shop", OWNER._replace(**other))


def test_a_digest_tells_its_parts_apart() -> None:
    assert ledger.digest("ab", "c") != ledger.digest("a", "bc")


@pytest.mark.parametrize(
    ("lists_variables", "count"),
    [
        pytest.param(True, 1_001, id="more-than-airflow-lists-at-once"),
        pytest.param(False, 100, id="airflow-lists-no-variables"),
    ],
    indirect=["lists_variables"],
)
@pytest.mark.usefixtures("supervisor")
def test_many_users_of_a_cluster_are_all_found(count: int) -> None:
    owners = [OWNER._replace(map_index=index) for index in range(count)]
    supervisor_keys = {use(owner) for owner in owners}
    assert set(ledger.keys("polars_cloud/cluster/", OWNER.run)) == supervisor_keys


@pytest.mark.usefixtures("supervisor")
def test_the_entries_of_a_run_are_its_own() -> None:
    other = OWNER._replace(run_id="manual__2")
    for owner in (OWNER, other):
        ledger.put(ledger.task_key(owner, "1"), owner, {"queries": {}})
        use(owner)
    use(RUN, "warehouse")
    assert [owner for _, owner, _ in ledger.task_entries("shop", "manual__1")] == [OWNER]
    used = {
        (owner, value["manifest"])
        for _, owner, value in ledger.cluster_entries("shop", "manual__1")
    }
    assert used == {(OWNER, "shop"), (RUN, "warehouse")}


# Users of a cluster


@pytest.mark.parametrize(
    ("state", "is_used"),
    [
        ("running", True),
        ("queued", True),
        ("scheduled", True),
        ("up_for_retry", True),
        ("restarting", True),
        ("deferred", True),
        (None, True),
        ("success", False),
        ("failed", False),
        ("skipped", False),
        ("upstream_failed", False),
        ("removed", False),
    ],
)
def test_a_task_uses_a_cluster_until_airflow_has_ended_it(
    supervisor: Supervisor, state: str | None, is_used: bool
) -> None:
    supervisor.states["manual__1"]["other"] = state
    key = use(OWNER._replace(task_id="other"))
    assert ledger.has_other_users("shop", OWNER) is is_used
    # An entry that nobody needs any more is erased by whoever finds it.
    assert (key in supervisor.variables) is is_used


def test_a_run_uses_a_cluster_until_airflow_has_ended_its_last_task(
    supervisor: Supervisor,
) -> None:
    supervisor.states["manual__1"] |= {"start_cluster": "success", "run_query_3": None}
    other = OWNER._replace(run_id="manual__2")
    use(RUN)
    assert ledger.has_other_users("shop", other)
    supervisor.states["manual__1"]["run_query_3"] = "failed"
    assert not ledger.has_other_users("shop", other)


@pytest.mark.usefixtures("supervisor")
def test_a_run_that_was_deleted_uses_no_cluster() -> None:
    use(RUN)
    assert not ledger.has_other_users("shop", OWNER)


def test_a_mapped_task_uses_a_cluster_on_its_own(supervisor: Supervisor) -> None:
    supervisor.states["manual__1"] |= {"run_query_0": "success", "run_query_1": "running"}
    use(OWNER._replace(map_index=0))
    assert not ledger.has_other_users("shop", OWNER)
    use(OWNER._replace(map_index=1))
    assert ledger.has_other_users("shop", OWNER)


def test_the_owner_itself_is_no_other_user(supervisor: Supervisor) -> None:
    supervisor.states["manual__1"]["run_query"] = "running"
    use(OWNER)
    assert not ledger.has_other_users("shop", OWNER)


def test_the_user_of_another_cluster_is_no_user_of_this_one(supervisor: Supervisor) -> None:
    supervisor.states["manual__1"]["other"] = "running"
    use(OWNER._replace(task_id="other"), "warehouse")
    assert not ledger.has_other_users("shop", OWNER)


# Signals


@contextmanager
def airflows_own_line_to(supervisor: Supervisor, answers: Event) -> Iterator[Event]:
    """Airflow's own way from a task to its supervisor; gives the sign that a call has come in."""
    near, far = socketpair()
    called = Event()

    def serve() -> None:
        stream = far.makefile("rwb")
        while length := stream.read(4):
            frame = stream.read(int.from_bytes(length, "big"))
            request_id, body = msgspec.msgpack.decode(frame)[:2]
            called.set()
            answers.wait()
            answer: Any = supervisor.send(getattr(comms, body["type"])(**body))
            reply = comms._ResponseFrame(request_id, answer and answer.model_dump())
            stream.write(reply.as_bytes())
            stream.flush()

    thread = Thread(target=serve, daemon=True)
    thread.start()
    with near, far:
        with set_supervisor_comms(comms.CommsDecoder(socket=near)):
            yield called
        near.close()
        thread.join()


def test_a_kill_while_airflow_is_called_does_not_disturb_the_next_call() -> None:
    class Killed(BaseException):
        pass

    def raise_killed(*_: object) -> None:
        raise Killed

    def kill() -> None:
        called.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    answers = Event()
    before = signal.signal(signal.SIGTERM, raise_killed)
    try:
        with airflows_own_line_to(Supervisor(), answers) as called:
            killer = Thread(target=kill)
            killer.start()
            with pytest.raises(Killed):
                use(OWNER)
            killer.join()
            answers.set()
            used = ledger.keys("polars_cloud/cluster/", OWNER.run)
            assert used == [ledger.cluster_key("shop", OWNER)]
            entry = ledger.get(ledger.cluster_key("shop", OWNER))
            assert entry is not None
            assert entry[0] == OWNER
    finally:
        signal.signal(signal.SIGTERM, before)
