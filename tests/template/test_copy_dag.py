"""What `make copy` writes into a folder, and what it prints."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from copy_dag import main
from local_airflow import ROOT

MADE_HERE = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())]


@pytest.fixture
def other_release(tmp_path: Path) -> Path:
    """A copy of this repository that a test may change."""
    folder = tmp_path / "other_release"
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*MADE_HERE)))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A DAGs folder."""
    folder = tmp_path / "there"
    folder.mkdir()
    return folder


def copy_from(repository: Path, dag_id: str, to: Path) -> str:
    """Copy a DAG from another repository; return the output."""
    script = [sys.executable, str(repository / "scripts" / "copy_dag.py"), dag_id, str(to)]
    return subprocess.run(script, check=True, capture_output=True, text=True, timeout=60).stdout


def commit(repository: Path) -> None:
    git = ["git", "-C", str(repository), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=release"]):
        subprocess.run([*git, *command], check=True)


def changed(file: Path) -> str:
    """Change a file, as its user would; return its text."""
    file.write_text(file.read_text() + "MINE = True\n")
    return file.read_text()


def test_a_second_dag_joins_the_first(tmp_path: Path) -> None:
    for dag_id in ("single_query", "status_check", "status_check"):
        main(dag_id, str(tmp_path))
    assert {file.name for file in tmp_path.glob("*.py")} == {"single_query.py", "status_check.py"}


@pytest.mark.parametrize(
    ("dag_id", "needed"),
    [
        ("single_query", {"auth.py", "shop.py"}),
        ("preflight", {"auth.py", "preflight.py", "shop.py"}),
    ],
)
def test_what_a_dag_needs_is_copied_and_no_more(
    tmp_path: Path, dag_id: str, needed: set[str]
) -> None:
    main(dag_id, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{dag_id}.py",
        "include",
        "polars_remote",
    }
    copied = {path.name for path in (tmp_path / "include").iterdir()}
    assert copied == needed | {"__init__.py", ".airflowignore"}


def test_a_second_copy_deletes_nothing(there: Path) -> None:
    main("single_query", str(there))
    before = get_contents(there)
    main("single_query", str(there))
    assert get_contents(there) == before


def test_the_library_is_copied_to_the_plugins_of_an_airflow_home(tmp_path: Path) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "airflow.cfg").touch()
    main("status_check", str(tmp_path))
    assert {path.name for path in (tmp_path / "plugins").iterdir()} == {"include", "polars_remote"}


def test_a_copy_of_an_older_release_is_upgraded(there: Path, other_release: Path) -> None:
    library = other_release / "plugins" / "polars_remote"
    (library / "settings.py").write_text("OLD = True\n")
    (library / "removed.py").write_text("OLD = True\n")
    (library / "__init__.py").write_text('__version__ = "0.9.0"\n')
    (other_release / "dags" / "status_check.py").write_text("import include.auth\n")
    copy_from(other_release, "status_check", there)

    said = copy_from(ROOT, "single_query", there)

    assert "The version before was 0.9.0." in said
    assert not (there / "polars_remote" / "removed.py").exists()
    for name in ("polars_remote/settings.py", "polars_remote/__init__.py"):
        assert (there / name).read_bytes() == (ROOT / "plugins" / name).read_bytes()
    for name in ("single_query.py", "status_check.py"):
        assert (there / name).read_bytes() == (ROOT / "dags" / name).read_bytes()


def test_a_copy_from_before_there_were_notes_is_upgraded(there: Path, other_release: Path) -> None:
    files = {
        "dags/single_query.py": "from include.polars_remote import submit\n",
        "dags/status_check.py": "from include.polars_remote import submit  # edited later\n",
        "include/auth.py": "from include.polars_remote import login\n",
        "include/polars_remote/__init__.py": "def submit(): ...\n",
    }
    current = {name: (other_release / name).read_text() for name in files if "remote" not in name}
    for name, text in files.items():
        (other_release / name).parent.mkdir(exist_ok=True)
        (other_release / name).write_text(text)
        place = there / name.removeprefix("dags/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    mine = changed(there / "status_check.py")
    commit(other_release)
    shutil.rmtree(other_release / "include" / "polars_remote")
    for name, text in current.items():
        (other_release / name).write_text(text)
    commit(other_release)

    said = copy_from(other_release, "single_query", there)

    for name in ("single_query.py", "include/auth.py"):
        assert (there / name).read_bytes() == (
            ROOT / ("" if "/" in name else "dags") / name
        ).read_bytes()
    for dag_id in ("single_query", "status_check", "single_query"):
        assert (there / "status_check.py").read_text() == mine
        assert f"Kept {there / 'status_check.py'}, because you have changed it: DIFF=1" in said
        said = copy_from(other_release, dag_id, there)
    former = there / "include" / "polars_remote"
    assert (former / "__init__.py").read_text() == files["include/polars_remote/__init__.py"]
    assert (
        f"Import polars_remote in place of include.polars_remote: {there / 'status_check.py'}."
        in said
    )
    assert f"Delete {former} once no task is deferred" in said


def get_contents(folder: Path) -> dict[str, str]:
    """Return the content of a folder: the text of each file, and the target of each link."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


def put_file(there: Path, name: str) -> None:
    (there / name).write_text("mine")


def put_folder(there: Path, name: str) -> None:
    (there / name / "mine").mkdir(parents=True)


def put_link_to_nowhere(there: Path, name: str) -> None:
    (there / name).symlink_to("/proc/self")  # where no file can be created


def put_link_to_this_repository(there: Path, name: str) -> None:
    (there / name).symlink_to(ROOT / "plugins" / name)


@pytest.mark.parametrize(
    ("put", "name", "sentence"),
    [
        (put_file, "include", "Nothing was copied: .*Not a directory: '{there}/include/"),
        (
            put_file,
            "polars_remote",
            "Nothing was copied: .*Not a directory: '{there}/polars_remote/",
        ),
        (put_folder, "single_query.py", "{there}/single_query.py is a folder, but dags/single_"),
        (
            put_folder,
            "include/auth.py",
            "{there}/include/auth.py is a folder, but include/auth.py ",
        ),
        (put_link_to_nowhere, "include", "No such file or directory: '/proc/.*Make the folder"),
        (
            put_link_to_this_repository,
            "polars_remote",
            "{there}/polars_remote/.* is this repository's own file",
        ),
    ],
)
def test_nothing_is_copied_if_a_file_cannot_be_written(
    there: Path, put: Callable[[Path, str], None], name: str, sentence: str
) -> None:
    put(there, name)
    before = get_contents(there)
    with pytest.raises(SystemExit, match=sentence.format(there=there)):
        main("single_query", str(there))
    assert get_contents(there) == before


def test_nothing_is_copied_into_this_repository() -> None:
    with pytest.raises(SystemExit, match="is this repository's own file"):
        main("single_query", str(ROOT))
    assert not (ROOT / "plugins" / "polars_remote" / "copied.json").exists()


def test_damaged_notes_are_an_error_and_nothing_is_copied(there: Path) -> None:
    main("single_query", str(there))
    changed(there / "polars_remote" / "copied.json")
    before = get_contents(there)
    with pytest.raises(SystemExit, match=r"polars_remote/copied\.json is damaged"):
        main("single_query", str(there))
    assert get_contents(there) == before


def test_a_symbolic_link_is_kept(there: Path, tmp_path: Path, other_release: Path) -> None:
    copy_from(other_release, "single_query", there)
    elsewhere = (there / "single_query.py").rename(tmp_path / "elsewhere.py")
    (there / "single_query.py").symlink_to(elsewhere)
    new = changed(other_release / "dags" / "single_query.py")
    copy_from(other_release, "single_query", there)
    assert (there / "single_query.py").readlink() == elsewhere
    assert elsewhere.read_text() == new


def test_components_that_need_a_restart_are_listed(tmp_path: Path, other_release: Path) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "airflow.cfg").touch()
    assert f"Restart Airflow: {tmp_path / 'plugins'} is new" in copy_from(
        other_release, "single_query", tmp_path
    )
    assert "Restart" not in copy_from(other_release, "status_check", tmp_path)
    changed(other_release / "plugins" / "polars_remote" / "settings.py")
    assert "Restart the triggerer" in copy_from(other_release, "status_check", tmp_path)


@pytest.mark.parametrize(
    "file", ["single_query.py", "include/auth.py", "include/shop.py", "polars_remote/settings.py"]
)
@pytest.mark.parametrize("next_dag", ["single_query", "manifest_reuse"])
def test_files_that_the_user_changed_are_kept_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, next_dag: str
) -> None:
    main("single_query", str(tmp_path))
    mine = changed(tmp_path / file)
    for _ in range(2):
        main(next_dag, str(tmp_path))
        assert (tmp_path / file).read_text() == mine
        assert (
            f"Kept {tmp_path / file}, because you have changed it: DIFF=1"
            in capsys.readouterr().out
        )
    main(next_dag, str(tmp_path), diff=True)
    assert "+MINE = True" in capsys.readouterr().out


def test_a_reverted_change_is_no_longer_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main("single_query", str(tmp_path))
    settings = tmp_path / "polars_remote" / "settings.py"
    before = settings.read_text()
    changed(settings)
    main("single_query", str(tmp_path))
    settings.write_text(before)
    capsys.readouterr()
    main("single_query", str(tmp_path))
    assert "Kept" not in capsys.readouterr().out


def test_a_dag_file_of_the_users_own_is_an_error_and_nothing_is_copied(tmp_path: Path) -> None:
    (tmp_path / "single_query.py").write_text("mine")
    with pytest.raises(SystemExit, match=r"single_query\.py is a file of your own"):
        main("single_query", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["single_query.py"]
    assert (tmp_path / "single_query.py").read_text() == "mine"


@pytest.mark.parametrize("module", ["auth.py", "shop.py"])
def test_a_module_that_lacks_an_import_of_the_dag_is_an_error_and_nothing_is_copied(
    tmp_path: Path, module: str
) -> None:
    place = tmp_path / "include" / module
    place.parent.mkdir()
    place.write_text("PRICES = {}\n")
    with pytest.raises(SystemExit, match=f"{place} was changed there and lacks .*, which dags/"):
        main("single_query", str(tmp_path))
    assert [*tmp_path.rglob("*.py")] == [place]


def test_an_upgrade_that_a_changed_module_does_not_fit_is_refused(
    tmp_path: Path,
) -> None:
    main("manifest_reuse", str(tmp_path))
    shop = tmp_path / "include" / "shop.py"
    shop.write_text(shop.read_text().replace("MANIFEST", "OURS"))
    with pytest.raises(SystemExit, match=r"lacks MANIFEST, which dags/manifest_reuse\.py imports"):
        main("single_query", str(tmp_path))


@pytest.mark.parametrize("hides", ["include", "plugins/include"])
def test_an_include_folder_that_could_hide_the_copied_one_is_an_error(
    tmp_path: Path, hides: str
) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / hides).mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"import {tmp_path / hides} in place .* TO={tmp_path}$"):
        main("single_query", str(tmp_path / "dags"))
    assert list((tmp_path / "dags").iterdir()) == []


@pytest.mark.parametrize("holds", [".", "plugins", "dags"])
def test_files_are_added_to_an_include_folder_of_the_users_own(tmp_path: Path, holds: str) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "plugins").mkdir()
    (tmp_path / holds / "include").mkdir()
    main("single_query", str(tmp_path))
    copies = {auth.parent for auth in tmp_path.rglob("auth.py")}
    assert copies == {tmp_path / holds / "include"}
    assert not (tmp_path / holds / "include" / "__init__.py").exists()


def test_missing_settings_and_packages_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "requirements.txt").write_text("requests\n")
    main("manifest_reuse", str(tmp_path))
    said = capsys.readouterr().out
    assert "Set POLARS_CLOUD_WORKSPACE, POLARS_CLOUD_DATA, POLARS_CLOUD_MANIFEST for" in said
    assert "Create the Connection polars_cloud:" in said
    assert "Add polars-cloud==" in said


def test_a_dag_that_reads_no_table_needs_no_data_location(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main("end_orphans", str(tmp_path))
    assert "Set POLARS_CLOUD_WORKSPACE for DAG processor" in capsys.readouterr().out


def test_existing_settings_and_packages_are_not_listed(
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
    assert "Create the Connection" not in said
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
def test_a_requirement_that_conflicts_is_listed(
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
def test_a_wrong_dag_or_folder_is_an_error(
    tmp_path: Path, dag_id: str, to: str, sentence: str
) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "copy_dag.py"), dag_id, str(tmp_path / to)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert sentence in ran.stderr
