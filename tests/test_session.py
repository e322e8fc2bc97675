"""`cloud/session.py`: logins of Connections, their turns in one process, and the workspace."""

from collections.abc import Callable
from functools import partial
from threading import Barrier, Event
from types import ModuleType

import pytest
from airflow.sdk.exceptions import AirflowFailException

from polars_cloud_emulator.testing import RunningEmulator, eventually
from polars_remote.cloud import session as sessions
from polars_remote.cloud.retry import start_thread
from polars_remote.cloud.session import CloudSession
from polars_remote.errors import LoginRefusedError, WorkspaceNotFoundError
from tests.observed import calls
from tests.tries import Supervisor

FIRST, SECOND = "polars_cloud", "second"
CLIENT_IDS = {FIRST: "polars-cloud-emulator", SECOND: "polars-cloud-emulator-second"}
SECONDS = 20.0
"""Seconds after which a thread that waits for its turn fails the test."""

Calls = dict[str, Callable[[], object]]


@pytest.fixture(autouse=True)
def connections(
    emulator: RunningEmulator, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Connections with different accounts, in a process that has not logged in."""
    client_id, secret = emulator.add_service_account("second")
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", f"http://{client_id}:{secret}@")
    monkeypatch.setattr(sessions, "_login", type(sessions._login)())


@pytest.fixture
def list_with(pc: ModuleType) -> Calls:
    """Return a call, by Connection, that succeeds only with its account."""
    return {FIRST: pc.Workspace.list, SECOND: pc.Organization.list}


def waiting() -> list[str]:
    return sessions._login._waiting


def call_in_turn(list_with: Calls, conn_id: str) -> None:
    CloudSession(conn_id).call(list_with[conn_id])


def in_threads(function: Callable[[str], None], conn_ids: list[str]) -> None:
    """Call the function with each Connection's id, concurrently."""
    for thread in [start_thread(partial(function, conn_id)) for conn_id in conn_ids]:
        thread.result(SECONDS)


def callers(emulator: RunningEmulator, name: str) -> list[str]:
    """Return the account of each call whose path ends in this name."""
    return [each["account"] for each in emulator.journal() if each["path"].endswith(f"/{name}")]


# The login


def test_a_session_logs_in_with_its_first_call_and_not_before(
    emulator: RunningEmulator, list_with: Calls
) -> None:
    before = calls(emulator, "token")
    session = CloudSession(SECOND)
    assert calls(emulator, "token") == before
    for _ in range(2):
        session.call(list_with[SECOND])
    assert calls(emulator, "token") == before + 1
    assert callers(emulator, "organization") == [CLIENT_IDS[SECOND]] * 2


def test_log_in_logs_in_again_each_time(emulator: RunningEmulator, pc: ModuleType) -> None:
    before = calls(emulator, "token")
    for _ in range(2):
        CloudSession(SECOND).log_in()
    assert calls(emulator, "token") == before + 2


def test_a_call_gets_its_arguments_and_returns_what_the_function_returns() -> None:
    assert CloudSession(FIRST).call(divmod, 7, 3) == (2, 1)


def test_a_call_raises_the_functions_own_exception() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        CloudSession(FIRST).call(fail)


# Turns


def test_two_accounts_at_the_same_time_never_call_with_each_others_login(
    emulator: RunningEmulator, list_with: Calls
) -> None:
    def call_often(conn_id: str) -> None:
        session = CloudSession(conn_id)
        for _ in range(5):
            with session.logged_in():
                for _ in range(3):
                    session.call(list_with[conn_id])

    in_threads(call_often, [FIRST, SECOND] * 3)
    assert callers(emulator, "workspace") == [CLIENT_IDS[FIRST]] * 45
    assert callers(emulator, "organization") == [CLIENT_IDS[SECOND]] * 45


def test_a_session_whose_login_another_account_has_replaced_logs_in_again(
    emulator: RunningEmulator, list_with: Calls
) -> None:
    for conn_id in (FIRST, SECOND, FIRST):
        call_in_turn(list_with, conn_id)
    assert callers(emulator, "workspace") == [CLIENT_IDS[FIRST]] * 2
    assert callers(emulator, "organization") == [CLIENT_IDS[SECOND]]


def test_threads_of_one_account_call_at_the_same_time() -> None:
    all_are_in = Barrier(6)

    def act(conn_id: str) -> None:
        with CloudSession(conn_id).logged_in():
            all_are_in.wait(SECONDS)

    in_threads(act, [SECOND] * 6)


def test_a_turn_inside_a_turn_of_the_same_account_waits_for_nobody(list_with: Calls) -> None:
    with CloudSession(FIRST).logged_in():
        other = start_thread(partial(call_in_turn, list_with, SECOND))
        eventually(lambda: waiting() == [SECOND], SECONDS)
        inner = start_thread(partial(call_in_turn, list_with, FIRST))  # within the same turn, too
        inner.result(SECONDS)
        call_in_turn(list_with, FIRST)
        assert not other.done()
    other.result(SECONDS)


def test_an_account_logs_in_once_and_not_with_each_use(
    emulator: RunningEmulator, list_with: Calls
) -> None:
    before = calls(emulator, "token")
    in_threads(partial(call_in_turn, list_with), [SECOND] * 6)
    call_in_turn(list_with, SECOND)
    assert callers(emulator, "organization") == [CLIENT_IDS[SECOND]] * 7
    assert calls(emulator, "token") - before == 1


def test_an_account_that_is_always_busy_does_not_keep_another_one_from_its_turn() -> None:
    turns: list[str] = []

    def take_turn(conn_id: str) -> None:
        with CloudSession(conn_id).logged_in():
            turns.append(conn_id)

    may_end, has_begun = Event(), Event()

    def be_busy() -> None:
        with CloudSession(FIRST).logged_in():
            has_begun.set()
            assert may_end.wait(SECONDS)

    busy = start_thread(be_busy)
    assert has_begun.wait(SECONDS)
    second = start_thread(partial(take_turn, SECOND))
    eventually(lambda: waiting() == [SECOND], SECONDS)
    late = start_thread(partial(take_turn, FIRST))
    eventually(lambda: turns or waiting() == [SECOND, FIRST], SECONDS)
    may_end.set()
    busy.result(SECONDS)
    take_turn(FIRST)  # before a waiting thread can continue
    for thread in (second, late):
        thread.result(SECONDS)
    assert turns == [SECOND, FIRST, FIRST]


def test_a_login_that_is_refused_raises_and_lets_others_have_their_turn(
    emulator: RunningEmulator, list_with: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", f"http://{CLIENT_IDS[SECOND]}:wrong@")
    may_end, has_begun = Event(), Event()

    def be_busy() -> None:
        with CloudSession(FIRST).logged_in():
            has_begun.set()
            assert may_end.wait(SECONDS)

    busy = start_thread(be_busy)
    assert has_begun.wait(SECONDS)
    refused = [start_thread(partial(call_in_turn, list_with, SECOND)) for _ in range(2)]
    eventually(lambda: waiting() == [SECOND] * 2, SECONDS)
    late = start_thread(partial(call_in_turn, list_with, FIRST))
    eventually(lambda: waiting() == [SECOND, SECOND, FIRST], SECONDS)
    may_end.set()
    busy.result(SECONDS)
    for thread in refused:
        with pytest.raises(LoginRefusedError, match="'second' was refused"):
            thread.result(SECONDS)
    late.result(SECONDS)
    assert callers(emulator, "workspace") == [CLIENT_IDS[FIRST]]
    assert callers(emulator, "organization") == []


# The workspace


def test_a_session_looks_its_workspace_up_once(emulator: RunningEmulator, pc: ModuleType) -> None:
    session = CloudSession(FIRST)
    before = calls(emulator, "workspace")
    assert [session.find_workspace().name for _ in range(3)] == ["playground"] * 3
    assert calls(emulator, "workspace") == before + 1


def test_sessions_of_two_accounts_find_the_workspace_with_the_login_of_their_own(
    emulator: RunningEmulator, pc: ModuleType
) -> None:
    for conn_id in (FIRST, SECOND):
        CloudSession(conn_id).find_workspace()
    assert callers(emulator, "workspace") == [CLIENT_IDS[FIRST], CLIENT_IDS[SECOND]]


@pytest.mark.parametrize("name", ["nowhere", "play"])
def test_an_unknown_workspace_is_refused_with_those_that_there_are(
    pc: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sessions, "WORKSPACE", name)
    session = CloudSession(FIRST)
    with pytest.raises(WorkspaceNotFoundError) as refused:
        session.find_workspace()
    assert str(refused.value) == (
        f"Workspace '{name}' does not exist. Set POLARS_CLOUD_WORKSPACE to a workspace of this "
        "account: playground"
    )
    assert isinstance(refused.value, AirflowFailException)


def test_an_account_without_a_workspace_gets_advice_to_create_one(
    pc: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "WORKSPACE", "nowhere")
    monkeypatch.setattr(pc.Workspace, "list", lambda: [])
    with pytest.raises(WorkspaceNotFoundError, match="it has none yet, so make one in Polars"):
        CloudSession(FIRST).find_workspace()


def test_an_outage_during_the_lookup_of_the_workspace_is_waited_out(
    emulator: RunningEmulator, pc: ModuleType
) -> None:
    emulator.add_fault("GET workspace", "http_error", status=503)
    assert CloudSession(FIRST).find_workspace().name == "playground"
    assert emulator.state()["faults"] == []
