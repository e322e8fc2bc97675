"""The files besides code, such as workflows and pages, are valid and match the code."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from local_airflow import ROOT
from polars_remote import __version__

APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""SHA-256 of https://www.apache.org/licenses/LICENSE-2.0.txt."""
WORKFLOWS = sorted(
    f".github/workflows/{path.name}" for path in (ROOT / ".github/workflows").iterdir()
)
DOCUMENTS = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "emulator/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]


def without_code(markdown: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub creates for the headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: str) -> list[str]:
    text = without_code((ROOT / document).read_text())
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    return sorted({link for link in inline if not link.startswith("http")})


def group_of(name: str, manager: str) -> str | None:
    """Return the group in which Renovate updates a package that this manager has found."""
    rules: list[dict[str, Any]] = json.loads((ROOT / "renovate.json").read_text())["packageRules"]
    group = None
    for rule in rules:
        managers = rule.get("matchManagers", [manager])
        if manager in managers and name in rule.get("matchPackageNames", [name]):
            group = rule.get("groupName", group)
    return group


def read(file: str) -> str:
    return (ROOT / file).read_text()


def read_workflow(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a workflow and its only job."""
    workflow = yaml.safe_load(read(f".github/workflows/{name}.yml"))
    [job] = workflow["jobs"].values()
    return workflow, job


def test_the_license_is_the_apache_license() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        *(("vendor.github-workflows", file) for file in WORKFLOWS),
        *(("custom.github-workflows-require-timeout", file) for file in WORKFLOWS),
        ("vendor.renovate", "renovate.json"),
    ],
)
def test_a_settings_file_is_valid(schema: str, file: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, file]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_workflow_runs_all_parts_of_ci_and_may_only_read() -> None:
    workflow, job = read_workflow("check")
    assert job["steps"][-1] == {"run": ".ci/run ${{ matrix.part }}"}
    [by_default] = re.findall(r"parts=\(([\w ]+)\)", (ROOT / ".ci" / "run").read_text())
    assert job["strategy"]["matrix"] == {"part": by_default.split()}
    assert workflow["permissions"] == {"contents": "read"}
    assert "permissions" not in job


@pytest.mark.parametrize("file", WORKFLOWS)
def test_each_action_of_a_workflow_is_a_commit(file: str) -> None:
    used = re.findall(r"uses: (.*)", (ROOT / file).read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


def begin_release(tag: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the first script of the release workflow, as GitHub does."""
    _, job = read_workflow("release")
    script = next(step["run"] for step in job["steps"] if "run" in step)
    environment = {
        "PATH": os.environ["PATH"],
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_REF_NAME": tag,
        "GITHUB_REPOSITORY": "Your-Organization/your-repository",
        "GITHUB_SERVER_URL": "https://github.com",
        "RUNNER_TEMP": str(folder),
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_release_notes_are_the_section_of_the_change_log(tmp_path: Path) -> None:
    ran = begin_release(f"v{__version__}", tmp_path)
    assert ran.returncode == 0, ran.stderr
    notes = (tmp_path / "notes.md").read_text().strip()
    files = f"https://github.com/Your-Organization/your-repository/blob/v{__version__}"
    assert f"[Upgrading]({files}/docs/upgrading.md" in notes
    heading = f"## {__version__}\n\n"
    change_log = (ROOT / "CHANGELOG.md").read_text()
    assert heading + notes.replace(f"{files}/", "") in change_log
    assert (tmp_path / "output").read_text() == (
        f"version={__version__}\nimage=ghcr.io/your-organization/your-repository\n"
    )


def test_a_tag_that_differs_from_the_librarys_version_is_refused(tmp_path: Path) -> None:
    ran = begin_release("v0.0.1", tmp_path)
    assert ran.returncode == 1
    assert ran.stderr == (
        "The tag is v0.0.1, but the version in plugins/polars_remote/__init__.py is "
        f"{__version__}: tag v{__version__}\n"
    )
    assert not (tmp_path / "output").exists()


def test_a_release_signs_everything_that_it_contains() -> None:
    workflow, job = read_workflow("release")
    assert workflow["permissions"] == {"contents": "read"}
    steps = job["steps"]
    [image] = [step for step in steps if "build-push-action" in step.get("uses", "")]
    assert image["with"]["platforms"] == "linux/amd64,linux/arm64"
    assert re.search(rf"^FROM .* AS {image['with']['target']}$", read("Dockerfile"), re.MULTILINE)
    attested = [step["with"] for step in steps if "actions/attest@" in step.get("uses", "")]
    digest = "${{ steps.image.outputs.digest }}"
    assert [each.get("subject-digest", each.get("subject-path")) for each in attested] == [
        digest,
        ".venv/wheel/*.whl",
    ]
    [signature] = [step for step in steps if "cosign sign" in step.get("run", "")]
    assert signature["env"]["IMAGE"].endswith(f"@{digest}")
    # Everything is signed before the release.
    assert "gh release create" in steps[-1]["run"]
    assert " .venv/wheel/*.whl " in steps[-1]["run"]


def test_renovate_bumps_airflow_polars_and_the_image_in_one_pull_request() -> None:
    places = {
        "apache-airflow": ("pep621", "pyproject.toml", r'"apache-airflow=='),
        "polars-cloud": ("pip_requirements", "requirements.txt", r"^polars-cloud\b"),
        "apache/airflow": ("dockerfile", "Dockerfile", r"^FROM apache/airflow:"),
    }
    for manager, file, pattern in places.values():
        assert re.search(pattern, (ROOT / file).read_text(), re.MULTILINE), f"{manager}: {file}"
    [group] = {group_of(name, manager) for name, (manager, _, _) in places.items()}
    assert group is not None
    assert group == group_of("polars", "pip_requirements")
    assert group_of("ruff", "pep621") not in (None, group)


def test_renovate_keeps_the_minor_versions_of_the_older_airflows() -> None:
    rules = json.loads((ROOT / "renovate.json").read_text())["packageRules"]
    [rule] = [rule for rule in rules if rule.get("matchPackageNames") == ["apache-airflow"]]
    assert rule["matchUpdateTypes"] == ["major", "minor"]
    assert not rule["enabled"]
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    versions = {
        group: pins[0].removeprefix("apache-airflow==")
        for group, pins in groups.items()
        if group.startswith("airflow")
    }
    is_older = SpecifierSet(rule["matchCurrentVersion"])
    assert [group for group, version in versions.items() if version not in is_older] == ["airflow"]


def test_pre_commit_runs_the_tools_of_make_lint() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [(repo["repo"], hook["entry"]) for repo in settings["repos"] for hook in repo["hooks"]]
    assert hooks == [("local", "make lint")]
    [recipe] = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    tools = re.findall(r"^\t(\S+) -m (.+)$", recipe, re.MULTILINE)
    python = ".venv/bin/python"  # of the lock
    assert tools == [(python, "ruff check"), (python, "ruff format --check"), (python, "mypy")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(document: str) -> None:
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_reference_link_has_an_address(document: str) -> None:
    text = without_code((ROOT / document).read_text())
    named = set(re.findall(r"\]\[([\w-]+)\]", text))
    assert named == set(re.findall(r"^\[([\w-]+)\]: https://\S+$", text, re.MULTILINE))
