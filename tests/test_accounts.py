"""`accounts.py`: service accounts that take turns in one process, with the client's one login."""

from collections.abc import Callable, Iterator
from functools import partial
from threading import Barrier
from types import ModuleType

import pytest
from airflow.sdk.exceptions import AirflowFailException

from include.polars_remote import accounts
from include.polars_remote.accounts import acting_as
from include.polars_remote.outages import start_thread
from polars_cloud_emulator.testing import RunningEmulator, eventually
from tests.observed import calls
from tests.tries import Supervisor

FIRST, SECOND = "polars_cloud", "second"
CLIENT_IDS = {FIRST: "polars-cloud-emulator", SECOND: "polars-cloud-emulator-second"}
SECONDS = 20.0
"""After which a thread that is kept from its turn fails the test."""

Looks = dict[str, Callable[[], object]]


@pytest.fixture(autouse=True)
def connections(
    emulator: RunningEmulator, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Two Connections, each with an account of its own, and nobody who acts as either."""
    client_id, secret = emulator.add_service_account("second")
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", f"http://{client_id}:{secret}@")
    monkeypatch.setattr(accounts, "_users", 0)
    monkeypatch.setattr(accounts, "_waiting", [])
    accounts._account = None
    yield
    # Not as it was before: by now the client's login may be that of an account that is forgotten.
    accounts._account = None


@pytest.fixture
def looks(pc: ModuleType) -> Looks:
    """What is looked at with each Connection, and only with this one."""
    return {FIRST: pc.Workspace.list, SECOND: pc.Organization.list}


def look_in_turn(looks: Looks, conn_id: str) -> None:
    with acting_as(conn_id):
        looks[conn_id]()


def in_threads(function: Callable[[str], None], conn_ids: list[str]) -> None:
    """Call the function with each Connection's id, all at the same time."""
    for thread in [start_thread(partial(function, conn_id)) for conn_id in conn_ids]:
        thread.result(SECONDS)


def callers(emulator: RunningEmulator, name: str) -> list[str]:
    """Whose token came with each call whose path ends in this name."""
    return [each["account"] for each in emulator.journal() if each["path"].endswith(f"/{name}")]


def test_two_accounts_at_the_same_time_never_call_with_each_others_login(
    emulator: RunningEmulator, looks: Looks
) -> None:
    def look_often(conn_id: str) -> None:
        for _ in range(5):
            with acting_as(conn_id):
                for _ in range(3):
                    looks[conn_id]()

    in_threads(look_often, [FIRST, SECOND] * 3)
    assert callers(emulator, "workspace") == [CLIENT_IDS[FIRST]] * 45
    assert callers(emulator, "organization") == [CLIENT_IDS[SECOND]] * 45


def test_threads_of_one_account_act_at_the_same_time() -> None:
    all_are_in = Barrier(6)

    def act(conn_id: str) -> None:
        with acting_as(conn_id):
            all_are_in.wait(SECONDS)

    in_threads(act, [SECOND] * 6)


def test_an_account_logs_in_once_and_not_with_each_use(
    emulator: RunningEmulator, looks: Looks
) -> None:
    before = calls(emulator, "token")
    in_threads(partial(look_in_turn, looks), [SECOND] * 6)
    look_in_turn(looks, SECOND)
    assert callers(emulator, "organization") == [CLIENT_IDS[SECOND]] * 7
    assert calls(emulator, "token") - before == 1


def test_an_account_that_is_always_busy_does_not_keep_another_one_from_its_turn() -> None:
    turns: list[str] = []

    def take_turn(conn_id: str) -> None:
        with acting_as(conn_id):
            turns.append(conn_id)

    with acting_as(FIRST):
        second = start_thread(partial(take_turn, SECOND))
        eventually(lambda: accounts._waiting == [SECOND], SECONDS)
        late = start_thread(partial(take_turn, FIRST))
        eventually(lambda: turns or accounts._waiting == [SECOND, FIRST], SECONDS)
    take_turn(FIRST)  # before any thread that has waited can have noticed
    for thread in (second, late):
        thread.result(SECONDS)
    assert turns == [SECOND, FIRST, FIRST]


def test_a_login_that_is_refused_raises_and_lets_others_have_their_turn(
    emulator: RunningEmulator, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_SECOND", f"http://{CLIENT_IDS[SECOND]}:wrong@")
    with acting_as(FIRST):
        refused = [start_thread(partial(look_in_turn, looks, SECOND)) for _ in range(2)]
        eventually(lambda: accounts._waiting == [SECOND] * 2, SECONDS)
        late = start_thread(partial(look_in_turn, looks, FIRST))
        eventually(lambda: accounts._waiting == [SECOND, SECOND, FIRST], SECONDS)
    for thread in refused:
        with pytest.raises(AirflowFailException, match="'second' was refused"):
            thread.result(SECONDS)
    late.result(SECONDS)
    assert callers(emulator, "workspace") == [CLIENT_IDS[FIRST]]
    assert callers(emulator, "organization") == []
