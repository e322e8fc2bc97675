"""A full disk: a call is either committed, or refused without changing anything."""

import contextlib
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import polars as pl
import pytest

from emulator.tests.command_line import Served
from emulator.tests.disks import full_disk
from emulator.tests.processes import descendants
from emulator.tests.raw_calls import CLUSTER
from polars_cloud_emulator.testing import RunningEmulator, eventually

StartCluster = Callable[..., Any]

CALL_ERRORS = (ValueError, RuntimeError)
READS = re.compile("GET .*|Get.*")
CHANGE_NO_STATE = {"DeleteQueryResult", "POST device", "POST token"}
PASSING = {"billed_seconds", "seconds"}
"""Fields that change with time."""


def seen(emulator: RunningEmulator) -> dict[str, Any]:
    """Return the state without the fields that change with time."""
    state = emulator.state()
    for kind in ("clusters", "queries"):
        state[kind] = [
            {name: value for name, value in each.items() if name not in PASSING}
            for each in state[kind]
        ]
    return state


@pytest.fixture
def calls(
    pc: ModuleType, emulator: RunningEmulator, start_cluster: StartCluster
) -> dict[str, Callable[[], object]]:
    """Return each call of a client that changes the state; one cluster runs a query."""
    frame = pl.LazyFrame({"x": [1]})
    direct, proxy = start_cluster(), start_cluster(connection_mode="proxy")
    for name in ("registered", "unregistered"):
        emulator.call("POST", "manifest", CLUSTER | {"name": name})
    emulator.add_fault("SubmitQuery", "query_hangs", times=2)
    running = [frame.remote(context).execute(blocking=False) for context in (direct, proxy)]
    cluster = direct._compute_id
    return {
        "POST compute/start": lambda: emulator.call("POST", "compute/start", CLUSTER),
        "POST manifest": lambda: emulator.call("POST", "manifest", CLUSTER | {"name": "new"}),
        "POST manifest/start": lambda: emulator.call(
            "POST", "manifest/start", {"name": "registered"}
        ),
        "DELETE manifest": lambda: emulator.call("DELETE", "manifest?name=unregistered"),
        "SubmitQuery": lambda: frame.remote(direct).execute(blocking=False),
        "SubmitQuery of the proxy": lambda: frame.remote(proxy).execute(blocking=False),
        "CancelQuery": running[0].cancel,
        "POST query/{id}/cancel": running[1].cancel,
        "POST compute/{id}/stop": lambda: emulator.call("POST", f"compute/{cluster}/stop"),
    }


@contextlib.contextmanager
def no_room_for_the_state(emulator: RunningEmulator) -> Iterator[None]:
    """Make the emulator's writes of its state fail, but no others, while the context is open."""
    with contextlib.closing(sqlite3.connect(state_dir(emulator) / "state.sqlite")) as file:
        file.execute("BEGIN IMMEDIATE")
        yield
        file.rollback()


def state_dir(emulator: RunningEmulator) -> Path:
    return Path(emulator.environment["SSL_CERT_DIR"]).parent


@pytest.mark.parametrize(
    "no_room", [lambda emulator: full_disk(emulator.pid), no_room_for_the_state]
)
def test_call_that_cannot_be_written_to_disk_changes_nothing(
    emulator: RunningEmulator,
    calls: dict[str, Callable[[], object]],
    no_room: Callable[[RunningEmulator], AbstractContextManager[None]],
) -> None:
    plans = state_dir(emulator) / "plans"
    eventually(lambda: all(len(each["worker_pids"]) == 1 for each in seen(emulator)["clusters"]))
    eventually(lambda: all(query["started_at"] for query in seen(emulator)["queries"]))
    before = seen(emulator), descendants(emulator.pid), {*plans.iterdir()}
    with no_room(emulator):
        for name, call in calls.items():
            expected = "the emulator cannot write its state .*: free disk space, and try again"
            # The client raises no error for a query that cannot be canceled.
            says = name != "CancelQuery"
            with pytest.raises(CALL_ERRORS, match=expected) if says else contextlib.nullcontext():
                call()
            entry = emulator.journal()[-1]
            assert (entry["status"], entry["grpc_status"]) in {(500, None), (200, 13)}
            after = seen(emulator), descendants(emulator.pid), {*plans.iterdir()}
            assert after == before
    for call in calls.values():
        call()
    state = seen(emulator)
    assert state["manifests"] == ["new", "registered"]
    assert [query["status"] for query in state["queries"][:2]] == ["Canceled", "Canceled"]
    assert len(state["clusters"]) == 4


def test_every_call_that_changes_the_state_is_tried(
    emulator: RunningEmulator, calls: dict[str, Callable[[], object]]
) -> None:
    with pytest.raises(ValueError, match="its operations are") as refused:
        emulator.add_fault("no such call", "tokens_expire")
    known = set(str(refused.value).partition("its operations are ")[2].split(", "))
    changing = {call for call in known if not READS.fullmatch(call)} - CHANGE_NO_STATE
    assert changing == {call.partition(" of ")[0] for call in calls}


def test_refused_call_has_done_nothing_after_a_restart(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    options = ("--port-base", 0, "--state-dir", tmp_path / "state")
    served = serve(*options)
    served.call("POST", "manifest", CLUSTER | {"name": "kept"})
    cluster = served.call("POST", "compute/start", CLUSTER)["id"]
    before = seen(served)
    with full_disk(served.pid):
        for method, path, body in (
            ("POST", "manifest", CLUSTER | {"name": "refused"}),
            ("DELETE", "manifest?name=kept", None),
            ("POST", "manifest/start", {"name": "kept"}),
            ("POST", f"compute/{cluster}/stop", None),
        ):
            with pytest.raises(ValueError, match="cannot write its state"):
                served.call(method, path, body)
        served.process.send_signal(signal.SIGKILL)
        served.process.wait(30)
    after = seen(serve(*options))
    for state in (before, after):
        state["clusters"][0].pop("worker_pids")
    assert after == before


def test_end_that_cannot_be_written_is_shown_and_reported_when_there_is_room(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    context = start_cluster()
    emulator.add_fault("SubmitQuery", "query_takes", seconds=60)
    query = pl.LazyFrame({"x": [1]}).remote(context).execute(blocking=False)
    eventually(lambda: seen(emulator)["queries"][0]["started_at"])
    query_id = seen(emulator)["queries"][0]["id"]
    with (
        full_disk(emulator.pid),
        httpx.Client(base_url=emulator.rest_url, trust_env=False) as browser,
    ):
        emulator.advance_clock(timedelta(minutes=1))
        # The result cannot be written either.
        eventually(lambda: seen(emulator)["queries"][0]["status"] == "Failed")
        page = browser.get("/")
        assert (page.status_code, "failed" in page.text) == (200, True)
        with pytest.raises(ValueError, match="cannot write its state"):
            emulator.call("GET", f"query/{query_id}")
        with pytest.raises(RuntimeError, match="cannot write its state"):
            query.get_status()
    assert emulator.call("GET", f"query/{query_id}")["status_code"] == "Failed"
    with pytest.raises(OSError, match="cannot store this object"):
        query.await_result()


def test_emulator_that_ends_on_a_full_disk_says_what_is_lost(serve: Callable[..., Served]) -> None:
    served = serve("--port-base", 0)
    served.call("POST", "compute/start", CLUSTER)
    eventually(lambda: served.state()["clusters"][0]["worker_pids"])
    with full_disk(served.pid):
        served.advance_clock(timedelta(hours=1))
        eventually(lambda: seen(served)["clusters"][0]["status"] == "Stopped")
        code, output, errors = served.stop()
    assert (code, output) == (0, "")
    [line] = errors.splitlines()
    assert "cannot write its state" in line


def test_reset_that_cannot_be_written_to_disk_changes_nothing(
    emulator: RunningEmulator, start_cluster: StartCluster
) -> None:
    start_cluster()
    eventually(lambda: len(seen(emulator)["clusters"][0]["worker_pids"]) == 1)
    before = seen(emulator)
    with full_disk(emulator.pid):
        with pytest.raises(ValueError, match="cannot write its state"):
            emulator.reset()
        assert seen(emulator) == before
    emulator.reset()
    assert seen(emulator)["clusters"] == []
