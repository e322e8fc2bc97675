"""`labels.py`: labels identify the task, and Polars Cloud accepts them."""

import polars as pl
import pytest

from polars_cloud_emulator.testing import RunningEmulator
from polars_remote import detach, use_cluster
from polars_remote.ownership.labels import MAX_LABEL_BYTES, get_labels, shorten
from tests.tries import StartTry

LONG = {"dag_id": "märkte_" * 20, "task_id": "x" * 200, "run_id": "scheduled__2026-11-23T00:00:00Z"}


def test_labels_name_dag_task_run_and_try(start_try: StartTry) -> None:
    with start_try(2, dag_id="multi_stage", task_id="sum_days", run_id="manual__7", scope=False):
        assert get_labels() == ["dag=multi_stage", "task=sum_days", "run=manual__7", "try=2"]


def test_labels_of_a_mapped_task_name_its_map_index(start_try: StartTry) -> None:
    with start_try(map_index=0, scope=False):
        assert get_labels()[4:] == ["map=0"]


@pytest.mark.parametrize(
    ("run_id", "labels"),
    [
        ("manual__7", ["run=manual__7"]),
        (
            "scheduled__2026-11-23T00:00:00+00:00",
            ["run=scheduled__2026-11-23~31c937", "run2=T00:00:00+00:00"],
        ),
        (
            "asset_triggered__2026-11-23T00:00:00.123456+00:00_Ab3dE6gH",
            [
                "run=asset_triggered__2026~868a48",
                "run2=-11-23T00:00:00.123456+00:",
                "run3=00_Ab3dE6gH",
            ],
        ),
        ("a run with a name of several words", ["run=a run with a name of ~93f972"]),
        ("märz_märz_märz_märz_märz_märz", ["run=märz_märz_märz_mä~e0c672"]),
    ],
)
def test_labels_hold_the_whole_id_of_the_run(
    start_try: StartTry, run_id: str, labels: list[str]
) -> None:
    with start_try(run_id=run_id, scope=False):
        assert [label for label in get_labels() if label.startswith("run")] == labels


def test_whole_id_of_the_longest_run_has_labels_of_32_bytes(start_try: StartTry) -> None:
    run_id = "0123456789" * 25  # the longest that Airflow stores
    with start_try(run_id=run_id, scope=False):
        labels = get_labels()
    assert all(len(label) <= MAX_LABEL_BYTES for label in labels)
    first, *others = (label.partition("=")[2] for label in labels if label.startswith("run"))
    assert first.partition("~")[0] + "".join(others) == run_id


@pytest.mark.parametrize("label", ["dag=" + "x" * 28, "dag=" + "ü" * 14])
def test_a_label_of_32_bytes_is_kept(label: str) -> None:
    assert len(label.encode()) == MAX_LABEL_BYTES == 32
    assert shorten(label) == label


@pytest.mark.parametrize("letter", ["x", "ü", "日", "🐻"])
def test_a_longer_label_is_cut_between_letters(letter: str) -> None:
    for before in ("dag=", "dag=_", "dag=__", "dag=___"):
        shortened = shorten(before + letter * 40)
        # Apart from the text that does not fit, at most a part of one letter is lost.
        assert MAX_LABEL_BYTES - len(letter.encode()) < len(shortened.encode()) <= MAX_LABEL_BYTES
        assert shortened.startswith(before + letter)
        assert "\N{REPLACEMENT CHARACTER}" not in shortened


def test_long_labels_that_begin_alike_are_kept_apart() -> None:
    days = [f"run=scheduled__2026-11-{day}T00:00:00+00:00" for day in range(10, 30)]
    assert len({shorten(day) for day in days}) == len(days)


def test_a_label_is_shortened_to_the_same_in_each_process() -> None:
    assert shorten("run=scheduled__2026-11-23T00:00:00+00:00") == "run=scheduled__2026-11-23~31c937"


@pytest.mark.usefixtures("pc")
def test_polars_cloud_shows_the_labels_of_a_task_with_long_ids(
    emulator: RunningEmulator, start_try: StartTry
) -> None:
    cluster = {"name": "shop", "cpus": 2, "memory": 4}
    with start_try(12, map_index=3, **LONG), use_cluster(cluster, stop=False) as ctx:
        detach(pl.LazyFrame({"x": [1]}).remote(ctx).sink_parquet("s3://your-bucket/labels/"))
        labels = get_labels()
    [query] = emulator.state()["queries"]
    assert query["labels"] == labels
    assert [label.partition("=")[0] for label in labels] == [
        *("dag", "task", "run", "try", "map", "run2"),
    ]
