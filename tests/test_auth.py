"""`include/auth.py`, and its login in `cloud/session.py`, through the unmodified client."""

import asyncio
import inspect
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from traceback import TracebackException
from typing import Any

import polars as pl
import pytest
from airflow.configuration import conf
from airflow.sdk import task
from airflow.sdk.exceptions import AirflowFailException

from include.auth import authenticate
from polars_cloud_emulator.testing import RunningEmulator
from polars_remote import use_cluster
from polars_remote.cloud.session import EMULATOR, log_in
from polars_remote.errors import (
    LoginRefusedError,
    NotAuthenticatedError,
    QueryRefusedError,
)
from polars_remote.ownership.scope import current_scope
from tests.observed import calls, cluster_statuses, entries
from tests.tries import StartTry, Supervisor

REPOSITORY = Path(__file__).parents[1]
PYTHON_PATH = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "plugins")])
WRONG_SECRET = "not-the-client-secret"
WHERE = "under Admin > Connections, in AIRFLOW_CONN_POLARS_CLOUD or in your secrets backend"
WHAT = "type = HTTP, login = client ID and password = client secret"


@pytest.fixture(autouse=True)
def account(emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the client's own variables, too: the login must still use the Connection."""
    for name in ("POLARS_CLOUD_CLIENT_ID", "POLARS_CLOUD_CLIENT_SECRET"):
        monkeypatch.setenv(name, emulator.environment[name])


@pytest.fixture(autouse=True)
def in_task(account: None, start_try: StartTry) -> Iterator[None]:
    """A task that has not logged in; the test is its body."""
    with start_try(scope=False):
        yield


LOG_IN = """
from airflow.sdk.execution_time.supervisor import set_supervisor_comms

from include.auth import authenticate
from tests.tries import Supervisor, start_try

@authenticate
def run_query():
    print("the query ran")

with set_supervisor_comms(Supervisor()), start_try(scope=False):
    run_query()
"""

DECORATE = """
import sys
from include.auth import authenticate

@authenticate
def run_query():
    pass

print("polars_cloud" in sys.modules)
"""

DAG_FILE = """
from airflow.sdk import dag, task
from include.auth import authenticate

@dag
def logs_in():
    @task
    @authenticate
    def run_query() -> str:
        return "the query ran"

    @task
    @authenticate
    async def await_query() -> str:
        return "the query was awaited"

    @task
    @authenticate
    def fail_query():
        raise RuntimeError("the query failed")

    @task(retries=3)
    @authenticate(conn_id="wrong_secret")
    def never_run():
        pass

    run_query(), await_query(), fail_query(), never_run()

if __name__ == "__main__":
    for ti in logs_in().test().get_task_instances():
        print(ti.task_id, ti.state, "after try", ti.try_number)
else:
    logs_in()
"""


@authenticate
def run_query(region: str, *, limit: int = 10) -> "Mapping[str, str]":
    """Sum the sales."""
    return {"region": region, "limit": str(limit)}


@authenticate(conn_id="nightly")
def run_nightly_query() -> str:
    return "the query ran"


def get_user() -> object:
    from polars_cloud.constants import API_CLIENT

    return API_CLIENT.get_user()


def call_get_user() -> object:
    """Call Polars Cloud with the task's login."""
    return current_scope().session.call(get_user)


@authenticate
def run_long_query(meanwhile: Callable[[], object]) -> str:
    meanwhile()
    call_get_user()
    return "the query ran"


@authenticate
async def await_query(region: str) -> dict[str, str]:
    return {"region": region}


def connection(login: str, password: str) -> str:
    return json.dumps({"conn_type": "http", "login": login, "password": password})


def run_python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a new interpreter, because the client reads its environment on import."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": PYTHON_PATH} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refusal(function: Callable[[], object]) -> str:
    """Return the message of an error that Airflow does not retry; check that it has no secret."""
    with pytest.raises(LoginRefusedError) as caught:
        function()
    error = caught.value
    assert isinstance(error, AirflowFailException)
    assert error.__cause__ is None
    assert error.__context__ is None
    frames = error.__traceback__.tb_next.tb_next  # type: ignore[union-attr]  # below this module
    rendered = "".join(TracebackException(type(error), error, frames, capture_locals=True).format())
    assert "conn_id = 'polars_cloud'" in rendered
    assert WRONG_SECRET not in rendered
    assert os.environ["POLARS_CLOUD_CLIENT_SECRET"] not in rendered
    return str(error)


@contextmanager
def rest_api_that_answers(status: int, body: str) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_function_runs_logged_in_with_its_arguments() -> None:
    assert run_query("north", limit=3) == {"region": "north", "limit": "3"}


def test_coroutine_function_runs_logged_in_with_its_arguments() -> None:
    assert inspect.iscoroutinefunction(await_query)
    assert asyncio.run(await_query("north")) == {"region": "north"}


def test_another_connection_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", os.environ["AIRFLOW_CONN_POLARS_CLOUD"])
    monkeypatch.delenv("AIRFLOW_CONN_POLARS_CLOUD")
    assert run_nightly_query() == "the query ran"


def test_a_task_without_authenticate_gets_a_clear_error() -> None:
    with pytest.raises(NotAuthenticatedError, match="put @authenticate below @task"):
        current_scope()


@pytest.mark.parametrize("run", [run_query, lambda region: asyncio.run(await_query(region))])
def test_a_task_that_has_ended_uses_no_cluster(
    emulator: RunningEmulator, run: Callable[[str], object]
) -> None:
    run("north")
    with (
        pytest.raises(QueryRefusedError, match="is not used, because its task has ended"),
        use_cluster({"name": "shop", "cpus": 2, "memory": 4}),
    ):
        pass
    assert emulator.state()["manifests"] == []


def test_the_scope_of_a_task_knows_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", os.environ["AIRFLOW_CONN_POLARS_CLOUD"])
    run = authenticate(conn_id="nightly")(lambda: current_scope().session.conn_id)
    assert run() == "nightly"


def test_a_function_inside_shares_the_login_queries_and_clusters_of_its_task(
    emulator: RunningEmulator, supervisor: Supervisor
) -> None:
    def submit(name: str) -> Any:
        with use_cluster({"name": name, "cpus": 2, "memory": 4}) as ctx:
            query = pl.LazyFrame({"x": [1]}).remote(ctx).sink_parquet(f"s3://your-bucket/{name}")
            query.await_result()

    @authenticate
    async def submit_later(name: str) -> None:
        submit(name)

    @authenticate
    def run() -> list[list[str]]:
        submit("outer")
        authenticate(submit)("inner")
        asyncio.run(submit_later("async"))
        recorded = [list(entry["queries"]) for entry in entries(supervisor, "task")]
        submit("last")
        return recorded

    assert run() == [[f"s3://your-bucket/{name}" for name in ("outer", "inner", "async")]]
    assert calls(emulator, "token") == 1
    assert cluster_statuses(emulator) == ["Stopped"] * 4
    assert supervisor.variables == {}


def test_a_function_inside_cannot_use_another_connection(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", os.environ["AIRFLOW_CONN_POLARS_CLOUD"])
    run = authenticate(authenticate(conn_id="nightly")(lambda: None))
    with pytest.raises(LoginRefusedError, match="is logged in with"):
        run()
    assert calls(emulator, "token") == 1


def test_task_logs_in_again_and_continues(emulator: RunningEmulator) -> None:
    expire = lambda: emulator.add_fault("GET user/me", "tokens_expire")  # noqa: E731
    assert run_long_query(expire) == "the query ran"
    assert calls(emulator, "token") == 2


def test_coroutine_logs_in_again(emulator: RunningEmulator) -> None:
    @authenticate
    async def await_long_query() -> None:
        emulator.add_fault("GET user/me", "tokens_expire")
        await asyncio.to_thread(call_get_user)

    asyncio.run(await_long_query())
    assert calls(emulator, "token") == 2


def test_task_logs_in_again_with_the_connection_it_named(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_NIGHTLY", os.environ["AIRFLOW_CONN_POLARS_CLOUD"])
    monkeypatch.delenv("AIRFLOW_CONN_POLARS_CLOUD")

    @authenticate(conn_id="nightly")
    def run_long_nightly_query() -> None:
        emulator.add_fault("GET user/me", "tokens_expire")
        call_get_user()

    run_long_nightly_query()
    assert calls(emulator, "token") == 2


def test_task_logs_in_again_with_what_the_connection_holds_by_then(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotated = connection(os.environ["POLARS_CLOUD_CLIENT_ID"], WRONG_SECRET)

    def rotate() -> None:
        monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", rotated)
        emulator.add_fault("GET user/me", "tokens_expire")

    sentence = refusal(lambda: run_long_query(rotate))
    assert "was refused by Polars Cloud" in sentence


@pytest.mark.usefixtures("short_outages")
def test_an_outage_that_outlasts_the_budget_while_logging_in_again_is_retried(
    emulator: RunningEmulator,
) -> None:
    def begin_outage() -> None:
        emulator.add_fault("GET user/me", "tokens_expire")
        emulator.add_fault("POST token", "connection_reset", times=1_000)

    with pytest.raises(ConnectionError, match="Polars Cloud could not be reached"):
        run_long_query(begin_outage)


def test_signature_name_and_docstring_are_kept() -> None:
    signature = inspect.signature(run_query)
    assert [str(parameter) for parameter in signature.parameters.values()] == [
        "region: str",
        "limit: int = 10",
    ]
    assert run_query.__name__ == "run_query"
    assert run_query.__doc__ == "Sum the sales."


@pytest.mark.parametrize(
    ("function", "expected"),
    [(run_query, True), (await_query, True), (run_nightly_query, False)],
)
def test_taskflow_infers_multiple_outputs(function: Callable[..., object], expected: bool) -> None:
    assert task(function).multiple_outputs is expected


def test_return_type_imported_for_type_checking_only_does_not_stop_the_dag_file() -> None:
    @authenticate
    def list_clusters() -> "ComputeContext":  # type: ignore[name-defined]  # noqa: F821
        pass

    assert task(list_clusters).multiple_outputs is False


def test_decorating_a_task_is_refused_with_the_right_order() -> None:
    with pytest.raises(TypeError, match="Put it below @task"):
        authenticate(task(lambda: None))


def test_naming_the_connection_by_position_is_refused_with_the_right_spelling() -> None:
    with pytest.raises(TypeError, match=r'@authenticate\(conn_id="..."\)'):
        authenticate("nightly")  # type: ignore[call-overload]


def test_decorating_imports_no_client_and_reads_no_connection() -> None:
    ran = run_python("-c", DECORATE, AIRFLOW_CONN_POLARS_CLOUD="")
    assert ran.stdout == "False\n", ran.stderr


def test_module_and_folder_work_beside_files_of_any_other_project(tmp_path: Path) -> None:
    elsewhere = tmp_path / "helpers"
    shutil.copytree(REPOSITORY / "plugins" / "polars_remote", elsewhere / "cloud")
    auth = (REPOSITORY / "include" / "auth.py").read_text()
    (elsewhere / "auth.py").write_text(auth.replace("polars_remote", "helpers.cloud"))
    for theirs in ("__init__.py", "settings.py", "queries.py"):
        (elsewhere / theirs).write_text("THEIRS = True\n")
    script = LOG_IN.replace("include.auth", "helpers.auth")
    ran = run_python("-c", script, PYTHONPATH=f"{tmp_path}{os.pathsep}{PYTHON_PATH}")
    assert ran.stdout.endswith("the query ran\n"), ran.stdout + ran.stderr


def test_missing_connection_says_what_to_set_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW_CONN_POLARS_CLOUD")
    sentence = refusal(lambda: run_query("north"))
    assert sentence.startswith("The Airflow Connection 'polars_cloud' is missing: ")
    assert WHERE in sentence
    assert WHAT in sentence


def test_a_process_without_the_client_says_what_to_install(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "AIRFLOW_CONN_POLARS_CLOUD", emulator.environment["AIRFLOW_CONN_POLARS_CLOUD"]
    )
    monkeypatch.setitem(sys.modules, "polars_cloud", None)
    error = log_in("polars_cloud")
    assert isinstance(error, LoginRefusedError)
    assert "cannot be imported here" in str(error)


@pytest.mark.parametrize(
    ("login", "password", "problem"),
    [
        ("", WRONG_SECRET, "has no login"),
        ("a-client", "", "has no password"),
        (EMULATOR, WRONG_SECRET, "was refused by Polars Cloud"),
    ],
)
@pytest.mark.parametrize("run", [run_query, lambda region: asyncio.run(await_query(region))])
def test_wrong_connection_says_what_to_set_and_where(
    run: Callable[[str], object],
    login: str,
    password: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", connection(login, password))
    sentence = refusal(lambda: run("north"))
    assert sentence.startswith(f"The Airflow Connection 'polars_cloud' {problem}: ")
    assert WHERE in sentence
    assert WHAT in sentence


def test_wrong_secret_of_a_known_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    client_id = os.environ["POLARS_CLOUD_CLIENT_ID"]
    monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", connection(client_id, WRONG_SECRET))
    assert "was refused by Polars Cloud" in refusal(lambda: run_query("north"))


@pytest.mark.parametrize("login", ["an-account", f"{EMULATOR}2"])
def test_an_accounts_credentials_are_never_sent_to_the_emulator(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", connection(login, WRONG_SECRET))
    sentence = refusal(lambda: run_query("north"))
    assert "its login is an account's, but this worker talks to the emulator" in sentence
    assert "set POLARS_CLOUD_EMULATOR=0 in .env" in sentence
    assert emulator.journal() == []


def test_each_account_of_the_emulator_logs_in(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_id, secret = emulator.add_service_account("second")
    monkeypatch.setenv("AIRFLOW_CONN_POLARS_CLOUD", connection(client_id, secret))
    run_long_query(lambda: None)
    assert emulator.journal()[-1]["account"] == client_id


@pytest.mark.parametrize("login", [EMULATOR, f"{EMULATOR}-second"])
def test_the_emulators_credentials_are_never_sent_to_an_account(
    emulator: RunningEmulator, login: str
) -> None:
    # Another name of the same address: a request to it would be in the journal.
    place = emulator.environment["POLARS_CLOUD_DOMAIN"].removeprefix("emulator")
    ran = run_python(
        "-c",
        LOG_IN,
        POLARS_CLOUD_DOMAIN=f"account{place}",
        AIRFLOW_CONN_POLARS_CLOUD=connection(login, WRONG_SECRET),
    )
    assert "LoginRefusedError: The Airflow Connection 'polars_cloud' was not used" in ran.stderr
    assert "its login is the emulator's, but this worker talks to Polars Cloud" in ran.stderr
    assert emulator.journal() == []


def test_an_accounts_refused_credentials_say_what_to_set(emulator: RunningEmulator) -> None:
    place = emulator.environment["POLARS_CLOUD_DOMAIN"].removeprefix("emulator")
    ran = run_python(
        "-c",
        LOG_IN,
        POLARS_CLOUD_DOMAIN=f"account{place}",
        AIRFLOW_CONN_POLARS_CLOUD=connection("an-account", WRONG_SECRET),
    )
    assert "'polars_cloud' was refused by Polars Cloud" in ran.stderr
    assert len(emulator.journal()) == 1


def test_token_that_the_rest_api_refuses_is_not_retried() -> None:
    with rest_api_that_answers(401, "{}") as address:
        ran = run_python("-c", LOG_IN, POLARS_CLOUD_API_ADDR=address)
    assert "LoginRefusedError: The Airflow Connection 'polars_cloud' was refused" in ran.stderr


def test_words_of_the_rest_api_come_through() -> None:
    words = "polars_cloud 0.11.3 is not supported: install polars_cloud 0.12"
    with rest_api_that_answers(400, json.dumps({"message": words, "errors": {}})) as address:
        ran = run_python("-c", LOG_IN, POLARS_CLOUD_API_ADDR=address)
    assert "ValueError" in ran.stderr
    assert words in ran.stderr


def test_unreachable_service_is_retried_and_says_what_to_check() -> None:
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))  # bound but not listening: the port refuses connections
        nowhere = f"emulator@127.0.0.1:{bound.getsockname()[1]}"
        ran = run_python("-c", LOG_IN, POLARS_CLOUD_DOMAIN=nowhere, POLARS_CLOUD_OUTAGE="1")
    assert "\nConnectionError: Polars Cloud could not be reached: check the network" in ran.stderr
    assert "LoginRefusedError" not in ran.stderr
    assert os.environ["POLARS_CLOUD_CLIENT_SECRET"] not in ran.stderr


@pytest.mark.usefixtures("airflow_db")
def test_dag_test_leaves_no_secret_in_log_or_database(tmp_path: Path) -> None:
    dag_file = tmp_path / "logs_in.py"
    dag_file.write_text(DAG_FILE)
    ran = run_python(
        str(dag_file),
        AIRFLOW__CORE__DAGS_FOLDER=str(tmp_path),
        AIRFLOW_CONN_WRONG_SECRET=connection(os.environ["POLARS_CLOUD_CLIENT_ID"], WRONG_SECRET),
    )
    log = ran.stdout + ran.stderr
    database = conf.get("database", "sql_alchemy_conn").removeprefix("sqlite:///")
    with closing(sqlite3.connect(database)) as sqlite:
        dump = "\n".join(sqlite.iterdump())

    assert "run_query success after try 1" in log
    assert "await_query success after try 1" in log
    assert "fail_query failed after try 1" in log
    assert "never_run failed after try 1" in log
    assert "The Airflow Connection 'wrong_secret' was refused by Polars Cloud" in log
    assert "the query ran" in dump
    assert "the query was awaited" in dump
    for secret in (os.environ["POLARS_CLOUD_CLIENT_SECRET"], WRONG_SECRET):
        assert secret not in log
        assert secret not in dump


def test_a_generator_is_refused_while_the_dag_file_is_parsed() -> None:
    def ask() -> Any:
        yield 1

    with pytest.raises(TypeError, match="which is a generator"):
        authenticate(ask)
