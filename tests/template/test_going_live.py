"""docs/going-live.md is right about the DAGs, the client and Airflow."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG, XComArg
from polars.exceptions import ColumnNotFoundError

from include.preflight import fits
from include.shop import get_schemas, scan_files
from local_airflow import ROOT
from polars_cloud_emulator.sample_data import shop_tables
from polars_cloud_emulator.testing import RunningEmulator
from tests.test_dag_integrity import CLUSTER_TASKS, DAG_IDS

DOCUMENT = (ROOT / "docs" / "going-live.md").read_text()
DAY = date(2026, 11, 23)

RUN_A_DAG = """
from airflow.dag_processing.dagbag import DagBag
from local_airflow import ROOT

print("the run ended:", DagBag(ROOT / "dags").dags["status_check"].test().state)
"""

Columns = set[tuple[str, str]]
"""Folder and column."""


def section(title: str) -> str:
    [text] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    return str(text)


def tables(title: str) -> list[list[list[str]]]:
    """Return the rows of each table in a section, without its header."""
    blocks = re.findall(r"(?:^\|.*\n)+", section(title), re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]
        for block in blocks
    ]


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def documented_types() -> dict[str, dict[str, str]]:
    """Return the type of each column, by folder."""
    return {
        names(folder)[0].rstrip("/"): {
            column: kind
            for columns, kind in re.findall(r"((?:`\w+`(?:, )?)+): ([^;]+)", cell)
            for column in names(columns)
        }
        for folder, cell in tables("Your own data")[0]
    }


def documented_reads() -> dict[str, Columns]:
    """Return the columns that each DAG reads, by DAG."""
    types = documented_types()
    reads: dict[str, Columns] = {}
    for dag, cell in tables("Your own data")[2]:
        [dag_id] = names(dag)
        reads[dag_id] = set()
        for folder, columns in re.findall(r"`(\w+)/`: ([^;]+)", cell):
            named = set(names(columns))
            assert named <= types[folder].keys()
            read = types[folder].keys() - named if columns.startswith("all but") else named
            reads[dag_id] |= {(folder, column) for column in read}
    return reads


class Shop:
    """The three tables in a folder, on which the DAGs run their queries without Airflow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._results = 0
        self.schemas = get_schemas()
        self.dags: dict[str, DAG] = {
            dag_id: dag for dag_id, dag in DagBag(ROOT / "dags").dags.items() if dag_id in DAG_IDS
        }

    def write(self, name: str, table: pl.DataFrame) -> None:
        (self._folder / name).mkdir(exist_ok=True)
        table.write_parquet(self._folder / name / "all.parquet")

    def run(self, dag_id: str) -> None:
        """Run the queries of the DAG's tasks with Polars."""
        locations: dict[str, Any] = {}
        for task in self.dags[dag_id].topological_sort():
            if task.task_id in CLUSTER_TASKS:
                continue
            function = inspect.unwrap(task.python_callable)
            # Replace everything between a query and a cluster; the query is the DAG's own.
            function.__globals__.update(
                scan=lambda table: scan_files(f"{self._folder}/{table}/", self.schemas[table]),
                use_cluster=lambda cluster, stop=True: nullcontext(),
                ensure_manifest=lambda cluster: None,
                detach=lambda query: query.location[0],
            )
            if task.is_mapped:
                [(name, values)] = task.op_kwargs_expand_input.value.items()
                arguments: dict[str, Any] = {name: values[0]}
            else:
                given = inspect.signature(function).bind_partial(*task.op_args, **task.op_kwargs)
                arguments = {
                    name: locations[value.operator.task_id] if isinstance(value, XComArg) else value
                    for name, value in given.arguments.items()
                }
            if "day" in arguments:
                arguments["day"] = str(DAY)
            if "outlet_events" in inspect.signature(function).parameters:
                arguments["outlet_events"] = defaultdict(SimpleNamespace)
            returned = function(**arguments)
            locations[task.task_id] = getattr(returned, "location", returned)
        assert locations

    def remote(self, frame: pl.LazyFrame, ctx: None) -> "Remote":
        """Replacement for `LazyFrame.remote`."""
        self._results += 1
        return Remote(frame, self._folder / f"result-{self._results}.parquet")


class Remote:
    """A query that Polars runs locally, and its result, instead of those of `polars_cloud`."""

    def __init__(self, frame: pl.LazyFrame, file: Path) -> None:
        self._frame = frame
        self._file = file
        self.location = [str(file)]

    def single_node(self) -> "Remote":
        return self

    def distributed(self) -> "Remote":
        return self

    def sink_parquet(self, uri: str, *, sink_to_single_file: bool = False) -> "Remote":
        return self.execute()

    def execute(self, *, blocking: bool = True) -> "Remote":
        self._frame.sink_parquet(self._file)
        return self

    def await_result(self) -> "Remote":
        return self


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    made = Shop(tmp_path)
    monkeypatch.setattr(pl.LazyFrame, "remote", lambda frame, ctx: made.remote(frame, ctx))
    return made


@pytest.fixture(scope="module")
def documented_tables() -> dict[str, pl.DataFrame]:
    """Return a week of the sample data, with only the documented columns."""
    week = pl.col("date").is_between(date(2026, 11, 17), DAY)
    return {
        name: table.filter(week).select(*documented_types()[name])
        for name, table in shop_tables(DAY).items()
    }


def test_the_table_of_columns_matches_the_schemas_and_the_sample_data(
    documented_tables: dict[str, pl.DataFrame],
) -> None:
    schemas = get_schemas()
    assert documented_types() == {
        name: {column: shown(kind) for column, kind in schema.items()}
        for name, schema in schemas.items()
    }
    assert schemas == {name: dict(table.schema) for name, table in documented_tables.items()}


def shown(kind: pl.DataType | type[pl.DataType]) -> str:
    if isinstance(kind, pl.Decimal):
        return f"Decimal({kind.precision}, {kind.scale})"
    return str(kind)


def test_the_table_of_accepted_types_matches_the_schemas_and_scan_files() -> None:
    documented = {wanted: files for wanted, files in tables("Your own data")[1]}
    wanted = {shown(kind): kind for schema in get_schemas().values() for kind in schema.values()}
    assert documented.keys() == wanted.keys()
    moments = [pl.Datetime(unit, zone) for unit in ("ms", "us", "ns") for zone in (None, "UTC")]
    kinds = [
        *(pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64),
        *(pl.Int128, pl.Float32, pl.Float64, pl.Decimal(10, 2), pl.Decimal(12, 2), pl.Boolean),
        *(pl.Date, pl.Time, *moments, pl.String, pl.Categorical(), pl.Enum(["a"]), pl.Binary),
    ]
    fitting = {
        name: {kind for kind in kinds if fits([kind], kind_of_schema)}
        for name, kind_of_schema in wanted.items()
    }
    assert fitting == {
        "Date": {pl.Date, *moments},
        "Int64": {pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32},
        "String": {pl.String, pl.Categorical(), pl.Enum(["a"])},
        "Decimal(10, 2)": {pl.Decimal(10, 2)},
    }


def test_each_dag_reads_the_columns_of_its_row_and_no_others(
    shop: Shop, documented_tables: dict[str, pl.DataFrame]
) -> None:
    for name, table in documented_tables.items():
        shop.write(name, table)
    for dag_id in DAG_IDS:
        shop.run(dag_id)  # nothing is missing

    reads: dict[str, Columns] = {dag_id: set() for dag_id in DAG_IDS}
    for name, table in documented_tables.items():
        for column in table.columns:
            shop.write(name, table.drop(column))
            kind = shop.schemas[name].pop(column)
            for dag_id in DAG_IDS:
                try:
                    shop.run(dag_id)
                except ColumnNotFoundError:
                    reads[dag_id].add((name, column))
            shop.schemas[name][column] = kind
        shop.write(name, table)
    assert documented_reads() == reads


def test_a_day_without_rows_gives_results_without_rows(
    shop: Shop, documented_tables: dict[str, pl.DataFrame]
) -> None:
    for name, table in documented_tables.items():
        shop.write(name, table.clear())
    for dag_id in DAG_IDS:
        shop.run(dag_id)


def test_the_table_of_costs_lists_the_nodes_of_each_dag_and_who_stops_them(
    shop: Shop,
) -> None:
    documented = {
        dag_id: (int(nodes), re.findall(r"(\d+) minutes after", end))
        for dags, nodes, end in tables("Cost of a run")[0]
        for dag_id in names(dags)
    }
    actual = {}
    for dag_id, dag in shop.dags.items():
        cluster = next(
            inspect.unwrap(task.python_callable).__globals__["CLUSTER"]
            for task in dag.tasks
            if task.task_id not in CLUSTER_TASKS
        )
        is_left = "stop=False" in Path(dag.fileloc).read_text()
        minutes = [str(cluster["idle_timeout_mins"])] if is_left else []
        actual[dag_id] = (cluster.get("cluster_size", 1), minutes)
    assert documented == actual


def pc(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys, polars_cloud; sys.argv[0] = 'pc'; polars_cloud.cli_main()"
    command = [sys.executable, "-c", code, *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_every_command_of_the_document_is_one_of_the_pinned_client() -> None:
    commands = re.findall(r"^ *(pc [a-z].*)$|`(pc [^`]+)`", DOCUMENT, re.MULTILINE)
    spelled = {block or inline for block, inline in commands} - {"pc setup"}
    assert len(spelled) > 4
    for command in spelled:
        _, *words = shlex.split(command)
        options = [word for word in words if word.startswith("--")]
        ran = pc(*words[: words.index(options[0])] if options else words)
        assert ran.returncode == 0, f"{command}: {ran.stderr}"
        for option in options:
            assert re.search(rf"{option}(?![\w-])", ran.stdout), command


def test_the_command_that_the_document_calls_old_does_not_exist() -> None:
    assert "`pc setup`" in DOCUMENT
    assert "unrecognized subcommand" in pc("setup").stderr


@pytest.mark.usefixtures("airflow_db")
def test_a_run_logs_in_with_the_connection_of_a_secrets_backend(
    emulator: RunningEmulator, tmp_path: Path
) -> None:
    [connections] = re.findall(r"^```json\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    [variables] = re.findall(r"^```sh\n(AIRFLOW.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    client_id, secret = emulator.add_service_account("of-the-file")
    file = tmp_path / "connections.json"
    file.write_text(
        connections.replace("<client id>", client_id).replace("<client secret>", secret)
    )
    at_path = variables.replace("/run/secrets", str(tmp_path))
    backend = dict(word.split("=", 1) for word in shlex.split(at_path))

    ran = subprocess.run(
        [sys.executable, "-c", RUN_A_DAG],
        # There is also a Connection of another account, which must not be used.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | backend,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "the run ended: success" in ran.stdout, ran.stdout + ran.stderr
    assert secret not in ran.stdout + ran.stderr
    assert {call["account"] for call in emulator.journal()} - {None} == {client_id}


def test_each_sentence_to_alert_on_is_logged_somewhere() -> None:
    folder = ROOT / "plugins" / "polars_remote"
    sources = "".join(path.read_text() for path in folder.rglob("*.py"))
    sentences = re.findall(r"\*([^*|]+)\*", section("Monitoring"))
    assert len(sentences) == 4
    for sentence in sentences:
        assert sentence in sources
