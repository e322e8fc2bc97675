"""Packages of `polars_remote` import only from the packages below them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "plugins" / "polars_remote"

ROOMS = {
    # Packages that each one may import, besides itself.
    "compat": set[str](),
    "links": {"compat"},
    "errors": {"compat"},
    "settings": {"errors"},
    "cloud": {"compat", "errors", "settings"},
    "ownership": {"cloud", "compat", "errors", "settings"},
    "connection": {"cloud", "settings"},
    "page": {"ownership", "compat"},
    "plugin": {"links", "page"},
    "waiting": {"ownership", "cloud", "compat", "errors", "settings"},
}
"""The modules that a DAG imports are above these packages, in this order."""
CALLED_BY_DAGS = ["queries", "query_tasks", "clusters", "__init__"]


def modules() -> list[Path]:
    return sorted(FOLDER.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    """Yield the packages that a module imports from, anywhere in its code."""
    depth = len(path.relative_to(FOLDER).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            if node.module:
                yield node.module.partition(".")[0]
            else:
                yield from (each.name for each in node.names)


def may_import(room: str) -> set[str]:
    if room in ROOMS:
        return ROOMS[room] | {room}
    below = CALLED_BY_DAGS[: CALLED_BY_DAGS.index(room)]
    return {*ROOMS, *below}


@pytest.mark.parametrize(
    "path", modules(), ids=lambda path: str(path.relative_to(FOLDER)).replace("/", ".")
)
def test_a_module_imports_from_its_own_room_and_from_those_below(path: Path) -> None:
    assert {*imported_rooms(path)} <= may_import(room_of(path))


def test_no_module_but_the_clients_own_imports_it_at_its_top() -> None:
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "polars" not in ast.unparse(node).split()[1].split("."), path


def test_the_shop_and_the_emulator_are_unknown_to_it() -> None:
    for path in modules():
        source = path.read_text()
        assert "sales" not in source, path
        assert "POLARS_CLOUD_DATA" not in source, path
        assert "import include" not in source, path
        assert "from include" not in source, path


def test_the_public_names_are_few() -> None:
    import polars_remote

    assert len(polars_remote.__all__) <= 7
    # Python's "Did you mean" for a misspelled import chooses from these.
    assert set(polars_remote.__all__) <= set(dir(polars_remote))
