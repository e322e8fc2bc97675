"""`ownership/record.py`: the record of the owners of queries and clusters."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socketpair
from threading import Event, Thread
from typing import Any

import msgspec
import pytest
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.supervisor import set_supervisor_comms

from polars_remote.cloud.session import CloudSession
from polars_remote.compat import variable_keys
from polars_remote.ownership import record
from polars_remote.ownership.end import has_other_users
from polars_remote.ownership.entry import TaskEntry
from polars_remote.ownership.record import (
    ClusterUse,
    Owner,
    QueryRecord,
    Result,
    TaskRecord,
    Wait,
)
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
    """With and without a list of Variables, as in Airflow 3.3 and in older versions."""
    monkeypatch.setattr(variable_keys, "LISTS_VARIABLES", request.param)


def put_use(owner: Owner, manifest: str = "shop") -> str:
    use = ClusterUse(owner, "polars_cloud", manifest)
    record.put(use.key, use)
    return use.key


def put_task(owner: Owner, ti_id: str = "1") -> str:
    key = record.task_key(owner, ti_id)
    record.put(key, TaskRecord(owner, "polars_cloud"))
    return key


def is_used(besides: Owner, manifest: str = "shop") -> bool:
    """Return whether another owner uses the cluster."""
    use = ClusterUse(besides, "polars_cloud", manifest)
    return has_other_users(CloudSession("polars_cloud"), use)


# Entries


@pytest.mark.usefixtures("supervisor")
def test_an_entry_is_what_was_written_last_until_it_is_erased() -> None:
    key = record.task_key(OWNER, "1")
    assert record.get_task(key) is None
    for uri in ("s3://bucket/one", "s3://bucket/two"):
        query = QueryRecord("cluster-1", "shop", [], destination=uri)
        task = TaskRecord(OWNER, "polars_cloud", queries={uri: query})
        record.put(key, task)
    assert record.get_task(key) == task
    record.erase(key)
    assert record.get_task(key) is None


@pytest.mark.usefixtures("supervisor")
def test_each_part_of_an_entry_is_read_as_it_was_written() -> None:
    query = QueryRecord(
        cluster_id="cluster-1",
        manifest="shop",
        known=["query-0"],
        try_number=2,
        destination="s3://bucket/one",
        has_location=False,
        query_id="query-1",
        page="https://cloud.example/query-1",
        submitted_at=1.5,
    )
    wait = Wait(
        since=2.5,
        cluster="cluster-1",
        returned={"polars_cloud_query": "s3://bucket/one"},
        outlet_events=[{"extra": {}}],
        results={"s3://bucket/one": Result(location=["s3://bucket/one"], rows=2)},
    )
    task = TaskRecord(
        owner=OWNER,
        conn_id="nightly",
        clear_number=3,
        is_stale=True,
        queries={"s3://bucket/one": query, "unsent": QueryRecord("cluster-1", "shop", [])},
        cluster_uses=["polars_cloud/cluster/x/y/z"],
        waits_for=wait,
        deadline=4.5,
    )
    record.put(record.task_key(OWNER, "1"), task)
    assert record.get_task(record.task_key(OWNER, "1")) == task
    use = ClusterUse(RUN, "nightly", "shop", stops=False)
    record.put(use.key, use)
    assert record.get_use(use.key) == use


def test_the_cluster_that_was_used_last_stays_last_when_an_earlier_use_is_added() -> None:
    owner = Owner("pipeline", "run", "report", -1)
    earlier = ClusterUse(owner, "polars_cloud", "shop", clusters={"first": 1.0})
    use = ClusterUse(owner, "polars_cloud", "shop", clusters={"second": 2.0})
    use.merge(earlier)
    assert list(use.clusters.items()) == [("first", 1.0), ("second", 2.0)]


@pytest.mark.usefixtures("supervisor")
def test_erasing_what_is_gone_is_no_error() -> None:
    record.erase(record.task_key(OWNER, "1"))


@pytest.mark.parametrize("is_raised", [True, False])
def test_an_airflow_that_does_not_answer_is_not_mistaken_for_a_missing_entry(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, is_raised: bool
) -> None:
    def refuse(msg: Any) -> Any:
        error = comms.ErrorResponse(error=ErrorType.API_SERVER_ERROR)
        if isinstance(msg, comms.GetVariable):
            if is_raised:
                raise AirflowRuntimeError(error)
            return error
        return send(msg)

    send = supervisor.send
    key = put_use(OWNER)
    monkeypatch.setattr(supervisor, "send", refuse)
    with pytest.raises(AirflowRuntimeError, match="API_SERVER_ERROR"):
        record.get_use(key)


@pytest.mark.parametrize("map_index", [-1, 0, 7])
def test_the_owner_is_the_task_that_runs(start_try: StartTry, map_index: int) -> None:
    with start_try(scope=False, map_index=map_index):
        assert Owner.current() == OWNER._replace(map_index=map_index)
        assert Owner.current(whole_run=True).whole_run


def test_keys_fit_into_airflow_and_show_no_name_that_looks_like_a_secrets() -> None:
    long = Owner("secret_" * 40, "manual__password", "api_token" * 30, 12_345)
    for key in (
        record.task_key(long, "123e4567-e89b-12d3-a456-426614174000"),
        ClusterUse(long, "polars_cloud", "access_key" * 30).key,
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
    different = OWNER._replace(**other)
    assert record.task_key(OWNER) != record.task_key(different)
    keys = {ClusterUse(owner, "polars_cloud", "shop").key for owner in (OWNER, different)}
    assert len(keys) == 2


def test_the_uses_of_different_clusters_differ() -> None:
    keys = {ClusterUse(OWNER, "polars_cloud", manifest).key for manifest in ("shop", "warehouse")}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("owner", "text"),
    [
        (OWNER, "shop.run_query in run manual__1"),
        (OWNER._replace(map_index=7), "shop.run_query[7] in run manual__1"),
    ],
)
def test_an_owner_is_named_by_dag_task_and_run(owner: Owner, text: str) -> None:
    assert str(owner) == text


def test_a_digest_distinguishes_its_parts() -> None:
    assert record.digest("ab", "c") != record.digest("a", "bc")


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
    keys = {put_use(owner) for owner in owners}
    assert set(record.find_keys(record.CLUSTERS, OWNER.run)) == keys


@pytest.mark.usefixtures("supervisor")
def test_the_entries_of_a_run_are_its_own() -> None:
    other = OWNER._replace(run_id="manual__2")
    tasks, uses = ({put(owner) for owner in (OWNER, other)} for put in (put_task, put_use))
    warehouse = put_use(RUN, "warehouse")
    [mine] = record.find_keys(f"{record.TASKS}{OWNER.run}/")
    assert mine in tasks
    assert {use.owner for key in tasks if (use := record.get_task(key))} == {OWNER, other}
    found = set(record.find_keys(record.CLUSTERS, OWNER.run))
    assert found == {warehouse, ClusterUse(OWNER, "polars_cloud", "shop").key}
    assert found < uses | {warehouse}


# Releases


OLD_QUERY = {"cluster_id": "cluster-1", "manifest": "shop", "known": ["query-0"], "try_number": 1}
OLD_SUBMITTED = {"query_id": "query-1", "page": "https://cloud.example", "submitted_at": 1.5}
OLD_TASK = {
    "owner": list(OWNER),
    "conn_id": "polars_cloud",
    "clear_number": 1,
    "over": True,
    "queries": {"s3://bucket/one": OLD_QUERY | OLD_SUBMITTED, "s3://bucket/two": OLD_QUERY},
    "kept": ["polars_cloud/cluster/x/y/z"],
    "waits_for": {},
    "deadline": None,
}
"""An entry in the format of the first release."""
OLD_WAIT = {
    "returned": {"polars_cloud_query": "s3://bucket/two"},
    "since": 2.5,
    "outlet_events": [],
    "results": {"s3://bucket/one": {"location": ["s3://bucket/one"], "rows": 2}},
}
OLD_CLUSTER_WAIT = {"cluster": "cluster-1", "since": 2.5}
OLD_USE = {"owner": list(OWNER), "manifest": "shop", "conn_id": "polars_cloud"}


def contains(new: Any, old: Any) -> bool:
    """Return whether the new entry contains each item of the old one."""
    if isinstance(old, dict):
        return all(key in new and contains(new[key], value) for key, value in old.items())
    return bool(new == old)


def test_an_entry_of_the_release_before_is_read(supervisor: Supervisor) -> None:
    key = record.task_key(OWNER, "1")
    record.put(key, TaskRecord(OWNER, "polars_cloud"))  # on an Airflow that cannot list Variables
    supervisor.variables[key] = json.dumps(OLD_TASK | {"waits_for": OLD_WAIT})
    query = QueryRecord("cluster-1", "shop", ["query-0"])
    submitted = QueryRecord(
        "cluster-1",
        "shop",
        ["query-0"],
        query_id="query-1",
        page="https://cloud.example",
        submitted_at=1.5,
    )
    wait = Wait(
        since=2.5,
        returned={"polars_cloud_query": "s3://bucket/two"},
        results={"s3://bucket/one": Result(location=["s3://bucket/one"], rows=2)},
    )
    task = TaskRecord(
        owner=OWNER,
        conn_id="polars_cloud",
        clear_number=1,
        is_stale=True,
        queries={"s3://bucket/one": submitted, "s3://bucket/two": query},
        cluster_uses=["polars_cloud/cluster/x/y/z"],
        waits_for=wait,
    )
    assert record.get_task(key) == task


def test_a_use_of_a_cluster_by_the_release_before_wants_a_stop() -> None:
    assert ClusterUse.load(OLD_USE) == ClusterUse(OWNER, "polars_cloud", "shop", stops=True)


@pytest.mark.parametrize("waits_for", [{}, OLD_WAIT, OLD_CLUSTER_WAIT])
def test_the_release_before_finds_all_that_it_needs(
    supervisor: Supervisor, waits_for: dict[str, Any]
) -> None:
    key = record.task_key(OWNER, "1")
    record.put(key, TaskRecord.load(OLD_TASK | {"waits_for": waits_for}))
    written = json.loads(supervisor.variables[key])
    assert contains(written, OLD_TASK | {"waits_for": waits_for})
    # It takes each key as set, and `{}` as no wait.
    assert not OLD_SUBMITTED.keys() & written["queries"]["s3://bucket/two"].keys()
    assert bool(written["waits_for"]) is bool(waits_for)

    record.put("polars_cloud/cluster/x/y/z", ClusterUse.load(OLD_USE))
    assert contains(json.loads(supervisor.variables["polars_cloud/cluster/x/y/z"]), OLD_USE)


def test_what_another_release_has_added_to_an_entry_stays_in_it(supervisor: Supervisor) -> None:
    result = {"location": [], "rows": None, "bytes": 1}
    later = OLD_TASK | {
        "version": 3,
        "pool": "small",
        "queries": {"s3://bucket/one": OLD_QUERY | OLD_SUBMITTED | {"cost": 0.1}},
        "waits_for": OLD_WAIT | {"until": "noon", "results": {"s3://bucket/one": result}},
    }
    key = record.task_key(OWNER, "1")
    record.put(key, TaskRecord.load(later))
    task = record.get_task(key)
    assert task is not None
    assert task.unknown == {"pool": "small"}
    task.is_stale = False
    record.put(key, task)
    assert contains(json.loads(supervisor.variables[key]), later | {"over": False})

    use = ClusterUse.load(OLD_USE | {"version": 3, "seats": 2})
    record.put(use.key, use)
    assert contains(json.loads(supervisor.variables[use.key]), OLD_USE | {"version": 3, "seats": 2})


def test_a_try_of_this_release_that_adopts_another_releases_entry_keeps_what_it_had(
    supervisor: Supervisor,
) -> None:
    earlier = OLD_TASK | {"pool": "small", "queries": {"s3://bucket/one": OLD_QUERY | {"cost": 1}}}
    record.put(record.task_key(OWNER, "1"), TaskRecord.load(earlier))
    entry = TaskEntry(record.task_key(OWNER, "2"), TaskRecord(OWNER, "polars_cloud", 1))
    entry.adopt_earlier_tries()
    [adopted] = [json.loads(text) for key, text in supervisor.variables.items() if key == entry.key]
    assert contains(adopted, earlier)


# Users of a cluster


@pytest.mark.parametrize(
    ("state", "is_active"),
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
    supervisor: Supervisor, state: str | None, is_active: bool
) -> None:
    supervisor.states["manual__1"]["other"] = state
    key = put_use(OWNER._replace(task_id="other"))
    assert is_used(OWNER) is is_active
    # The user that stops the cluster, or the sweep, erases it.
    assert key in supervisor.variables


def test_a_run_uses_a_cluster_until_airflow_has_ended_its_last_task(
    supervisor: Supervisor,
) -> None:
    supervisor.states["manual__1"] |= {"start_cluster": "success", "run_query_3": None}
    other = OWNER._replace(run_id="manual__2")
    put_use(RUN)
    assert is_used(other)
    supervisor.states["manual__1"]["run_query_3"] = "failed"
    assert not is_used(other)


@pytest.mark.usefixtures("supervisor")
def test_a_run_that_was_deleted_uses_no_cluster() -> None:
    put_use(RUN)
    assert not is_used(OWNER)


def test_a_mapped_task_uses_a_cluster_on_its_own(supervisor: Supervisor) -> None:
    supervisor.states["manual__1"] |= {"run_query_0": "success", "run_query_1": "running"}
    put_use(OWNER._replace(map_index=0))
    assert not is_used(OWNER)
    put_use(OWNER._replace(map_index=1))
    assert is_used(OWNER)


def test_the_owner_itself_is_no_other_user(supervisor: Supervisor) -> None:
    supervisor.states["manual__1"]["run_query"] = "running"
    put_use(OWNER)
    assert not is_used(OWNER)


def test_the_user_of_another_cluster_is_no_user_of_this_one(supervisor: Supervisor) -> None:
    supervisor.states["manual__1"]["other"] = "running"
    put_use(OWNER._replace(task_id="other"), "warehouse")
    assert not is_used(OWNER)


# Signals


@contextmanager
def airflows_own_line_to(supervisor: Supervisor, answers: Event) -> Iterator[Event]:
    """Airflow's connection from a task to its supervisor; yields an event that a call sets."""
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
                put_use(OWNER)
            killer.join()
            answers.set()
            [key] = record.find_keys(record.CLUSTERS, OWNER.run)
            assert record.get_use(key) == ClusterUse(OWNER, "polars_cloud", "shop")
    finally:
        signal.signal(signal.SIGTERM, before)
