"""`page.py`: a page with the queries and clusters in use, for authorized users."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from airflow.models import Variable
from airflow.utils.session import create_session
from sqlalchemy import delete

from polars_remote.ownership import record
from polars_remote.ownership.record import ClusterUse, Owner, QueryRecord, TaskRecord

pytestmark = pytest.mark.usefixtures("airflow_db")

PAGE = "/polars-cloud/"
EVIL = "<script>alert(1)</script>'\"&"
CLUSTER_ID = "0b8e5a34-6d53-4b4e-93a7-5a1d9d3c7f10"


@pytest.fixture(scope="module")
def api_server() -> Iterator[Any]:
    """Airflow's API server in this process, with the simple auth manager."""
    from airflow.api_fastapi.app import create_app
    from starlette.testclient import TestClient

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "only for these tests, and long enough" * 2)
        patched.setenv("AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS", "ann:admin,vic:viewer")
        yield TestClient(create_app(apps="core"), follow_redirects=False)


@pytest.fixture(autouse=True)
def empty_record() -> Iterator[None]:
    yield
    with create_session() as session:
        session.execute(delete(Variable))  # noqa: AIR311


def log_in(name: str, role: str) -> dict[str, str]:
    from airflow.api_fastapi.app import get_auth_manager
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser

    token = get_auth_manager().generate_jwt(SimpleAuthManagerUser(username=name, role=role))
    return {"Authorization": f"Bearer {token}"}


def store(key: str, value: str) -> None:
    with create_session() as session:
        session.add(Variable(key=key, val=value))  # noqa: AIR311


def put(key: str, entry: TaskRecord | ClusterUse) -> None:
    store(key, json.dumps(entry.dump()))


def use_cluster(owner: Owner, **options: Any) -> ClusterUse:
    use = ClusterUse(owner, "polars_cloud", "shop", **options)
    use.add_cluster(CLUSTER_ID, 3, 6, has_started=True)
    assert use.seen_at is not None
    use.seen_at -= 1800
    put(use.key, use)
    return use


def read(api_server: Any) -> str:
    answer = api_server.get(PAGE, headers=log_in("ann", "admin"))
    assert answer.status_code == 200
    return str(answer.text)


def test_nobody_without_a_login_reads_the_page(api_server: Any) -> None:
    assert api_server.get(PAGE).status_code == 401
    assert api_server.get(PAGE, headers={"Authorization": "Bearer x"}).status_code in (401, 403)
    for path in ("openapi.json", "docs"):
        assert api_server.get(PAGE + path).status_code in (401, 404)


def test_nobody_reads_the_page_who_may_not_read_variables(api_server: Any) -> None:
    assert api_server.get(PAGE, headers=log_in("vic", "viewer")).status_code == 403


def test_the_page_says_that_nothing_is_in_use(api_server: Any) -> None:
    assert "No query or cluster is in use" in read(api_server)


def test_the_page_shows_clusters_their_users_and_their_queries_with_links(
    api_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polars_remote.page.find_states", lambda *_: {("query", 3): "deferred"})
    owner = Owner("daily shop", "manual__2026-01-01T00:00:00+00:00", "query", 3)
    use = use_cluster(owner)
    page = "https://cloud.pola.rs/queries/1"
    query = QueryRecord(CLUSTER_ID, "shop", [], destination="s3://b/x.parquet", query_id="q-1")
    query.page, query.submitted_at = page, time.time()
    task = TaskRecord(owner, "polars_cloud", queries={"x": query}, cluster_uses=[use.key])
    put(record.task_key(owner, "1"), task)
    text = read(api_server)
    assert CLUSTER_ID in text
    assert "6 vCPUs, 3.00 vCPU-hours so far" in text
    run = "../dags/daily%20shop/runs/manual__2026-01-01T00%3A00%3A00%2B00%3A00"
    for link in ("../dags/daily%20shop", run, f"{run}/tasks/query/mapped/3", page):
        assert f"href='{link}'" in text
    assert "query[3]" in text
    assert "s3://b/x.parquet" in text
    assert "will be ended by" not in text


def test_the_page_says_what_ends_what_has_no_owner_any_more(api_server: Any) -> None:
    use_cluster(Owner("gone", "manual__1", "start_cluster", -1, whole_run=True))
    text = read(api_server)
    assert "will be ended by" in text
    assert "clean_up" in text
    assert "for the whole run" in text


def test_a_use_that_has_ended_is_not_in_use(api_server: Any) -> None:
    use_cluster(Owner("done", "manual__1", "query", -1), until=time.time())
    assert "No query or cluster is in use" in read(api_server)


def test_values_are_escaped(api_server: Any) -> None:
    owner = Owner(EVIL, EVIL, EVIL, -1)
    use_cluster(owner)
    query = QueryRecord(EVIL, EVIL, [], destination=EVIL, query_id=EVIL)
    query.page = "javascript:alert(1)"
    put(record.task_key(owner, "1"), TaskRecord(owner, "polars_cloud", queries={EVIL: query}))
    store(f"{record.TASKS}{EVIL}", "no JSON")
    text = read(api_server)
    assert "<script" not in text
    assert "javascript:" not in text
    assert "'\"" not in text
    assert "cannot be read" in text


def test_the_page_is_in_the_menu(api_server: Any) -> None:
    found = api_server.get("/api/v2/plugins", headers=log_in("ann", "admin")).json()
    [plugin] = [each for each in found["plugins"] if each["name"] == "polars_cloud"]
    [view] = plugin["external_views"]
    assert (view["name"], view["href"]) == ("Polars Cloud", "polars-cloud/")


def test_neither_the_plugin_nor_the_page_imports_the_client() -> None:
    code = (
        "import json, sys, polars_remote.plugin\n"
        "early = sorted(sys.modules)\n"
        "import polars_remote.page; polars_remote.page.app()\n"
        "print(json.dumps([early, sorted(sys.modules)]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    early, late = json.loads(ran.stdout.splitlines()[-1])
    assert not {"fastapi", "polars_remote.page", "polars_remote.ownership"} & set(early)
    assert not {"polars", "polars_cloud"} & set(late)
