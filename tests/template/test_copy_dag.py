"""What `make copy` does to the folder it copies to, and what it says about it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from copy_dag import main
from local_airflow import ROOT


def test_a_second_dag_joins_the_first(tmp_path: Path) -> None:
    for dag_id in ("single_query", "status_check", "status_check"):
        main(dag_id, str(tmp_path))
    assert {file.name for file in tmp_path.glob("*.py")} == {"single_query.py", "status_check.py"}


@pytest.mark.parametrize(
    ("dag_id", "needed"),
    [
        ("end_orphans", {"polars_remote"}),
        ("single_query", {"auth.py", "polars_remote", "shop.py"}),
        ("preflight", {"auth.py", "polars_remote", "preflight.py", "shop.py"}),
    ],
)
def test_what_a_dag_needs_is_copied_and_no_more(
    tmp_path: Path, dag_id: str, needed: set[str]
) -> None:
    main(dag_id, str(tmp_path))
    copied = {path.name for path in (tmp_path / "include").iterdir()}
    assert copied == needed | {"__init__.py", ".airflowignore"}


def test_a_shop_that_was_edited_stays_as_it_is(tmp_path: Path) -> None:
    main("single_query", str(tmp_path))
    shop = tmp_path / "include" / "shop.py"
    edited = shop.read_text().replace("s3://your-bucket", "s3://my-bucket")
    shop.write_text(edited)
    main("manifest_reuse", str(tmp_path))
    assert shop.read_text() == edited
    assert (tmp_path / "manifest_reuse.py").exists()


def test_a_shop_without_what_the_dag_imports_is_named(tmp_path: Path) -> None:
    shop = tmp_path / "include" / "shop.py"
    shop.parent.mkdir()
    shop.write_text("PRICES = {}\n")
    with pytest.raises(SystemExit, match=f"exist with other content:\n  {shop}\n"):
        main("single_query", str(tmp_path))
    assert shop.read_text() == "PRICES = {}\n"


def test_what_would_be_overwritten_is_named_and_nothing_is_copied(tmp_path: Path) -> None:
    include = tmp_path / "include"
    (include / "polars_remote").mkdir(parents=True)
    (include / "auth.py").write_text("mine")
    (include / "polars_remote" / "clusters.py").write_text("older")

    with pytest.raises(SystemExit) as error:
        main("single_query", str(tmp_path))

    assert re.findall("^  (.+)", str(error.value), re.MULTILINE) == [
        str(include / "auth.py"),
        str(include / "polars_remote" / "clusters.py"),
    ]
    files = {str(file.relative_to(include)) for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"auth.py", "polars_remote/clusters.py"}
    assert (include / "auth.py").read_text() == "mine"


@pytest.mark.parametrize("hides", ["include", "plugins/include"])
def test_an_include_folder_that_could_hide_the_copied_one_is_named(
    tmp_path: Path, hides: str
) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / hides).mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"import {tmp_path / hides} in place .* TO={tmp_path}$"):
        main("single_query", str(tmp_path / "dags"))
    assert list((tmp_path / "dags").iterdir()) == []


@pytest.mark.parametrize("holds", [".", "plugins", "dags"])
def test_an_include_folder_of_the_users_own_is_joined(tmp_path: Path, holds: str) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "plugins").mkdir()
    (tmp_path / holds / "include").mkdir()
    main("single_query", str(tmp_path))
    copies = {auth.parent for auth in tmp_path.rglob("auth.py")}
    assert copies == {tmp_path / holds / "include"}
    assert not (tmp_path / holds / "include" / "__init__.py").exists()


def test_what_is_missing_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "requirements.txt").write_text("requests\n")
    main("manifest_reuse", str(tmp_path))
    said = capsys.readouterr().out
    assert "Set POLARS_CLOUD_WORKSPACE, POLARS_CLOUD_DATA, POLARS_CLOUD_MANIFEST for" in said
    assert "Make the Connection polars_cloud:" in said
    assert "Add polars-cloud==" in said


def test_a_dag_that_reads_no_table_needs_no_data_location(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main("end_orphans", str(tmp_path))
    assert "Set POLARS_CLOUD_WORKSPACE for DAG processor" in capsys.readouterr().out


def test_what_is_there_is_not_called_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "Dockerfile").write_text("ENV POLARS_CLOUD_WORKSPACE=reports\n")
    (tmp_path / ".env").write_text("#POLARS_CLOUD_DATA=s3://old\n")
    (tmp_path / "airflow_settings.yaml").write_text(
        "airflow:\n  connections:\n    - conn_id: polars_cloud\n      conn_type: http\n"
    )
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    main("single_query", str(tmp_path))
    said = capsys.readouterr().out
    assert "Set POLARS_CLOUD_DATA for" in said
    assert "Make the Connection" not in said
    assert "Add" not in said


@pytest.mark.parametrize(
    ("line", "clashes"),
    [
        ("polars==1.43.2", True),
        ("polars>=1.30,<2", True),
        ("polars>=1.30", False),
        ("Polars_Cloud==0.11.0", True),
        ("apache-airflow[celery]==3.0.6  # ours", True),
        ("apache-airflow==3.1.8", False),
        ("--constraint constraints.txt", False),
    ],
)
@pytest.mark.parametrize("file", ["constraints-3.12.txt", "requirements/requirements.txt"])
def test_a_version_that_clashes_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, line: str, clashes: bool
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"# Ours\nrequests\n{line}\n")
    main("single_query", str(tmp_path))
    said = capsys.readouterr().out
    assert (f"{tmp_path / file} has " in said) == clashes


@pytest.mark.parametrize(
    ("dag_id", "to", "sentence"),
    [("query", ".", "There is no DAG 'query'"), ("single_query", "nowhere", "There is no folder")],
)
def test_a_name_that_is_wrong_is_named(tmp_path: Path, dag_id: str, to: str, sentence: str) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "copy_dag.py"), dag_id, str(tmp_path / to)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert sentence in ran.stderr
