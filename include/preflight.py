"""Steps that check the setup before the first DAG runs.

Each step logs one line, with its result or with advice. No step logs a secret. Each function
`check_...` of a step returns the text of its result, or raises.
"""

from __future__ import annotations

import functools
import logging
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, requires, version
from io import BytesIO
from typing import TYPE_CHECKING
from uuid import uuid4

from airflow import __version__ as airflow_version
from packaging.requirements import Requirement
from packaging.version import Version

from include.shop import DATA, MANIFEST, check_data_location, get_schemas, scan, scan_files
from polars_remote.cloud.advice import add_advice
from polars_remote.cloud.client import (
    get_cluster_id,
    get_cluster_status,
    misspecified_error,
)
from polars_remote.cloud.manifests import Cluster, find_manifest
from polars_remote.cloud.session import CloudSession, find_connection, uses_emulator
from polars_remote.clusters import start_and_wait, use_cluster
from polars_remote.compat.copies import FOLDER, describe, find_hidden_copies
from polars_remote.compat.versions import AirflowFailException
from polars_remote.ownership.scope import current_scope

if TYPE_CHECKING:
    import polars as pl
    from polars_cloud import ComputeContext

logger = logging.getLogger(__name__)

CONN_ID = "polars_cloud"

OLDEST_PYTHON = "3.11"

NEWEST_TESTED = {"Airflow": "3.3", "polars-cloud": "0.12"}
"""Newest tested releases. Newer ones may work."""

FILES_PER_QUERY = 100
"""Maximum number of files whose types one query reads."""

STOP_SECONDS = 300.0
"""Maximum seconds to wait for a cluster to stop."""


def check_setup() -> None:
    """Check everything that needs no cluster, from the installation to the manifest.

    Raises
    ------
    Exception
        The error of the first step that fails.
    """
    session = CloudSession(CONN_ID)
    for name, check in (
        ("Airflow", check_airflow),
        ("Client", check_client),
        ("Library", check_library),
        ("Data", check_data),
        ("Tables", check_tables),
        ("Connection", check_connection),
        ("Login", functools.partial(check_login, session)),
        ("Workspace", functools.partial(check_workspace, session)),
        ("Manifest", functools.partial(check_manifest, session)),
    ):
        with _step(name):
            logger.info("%s: ok: %s", name, check())


def check_cluster(cluster: Cluster, limit: timedelta) -> None:
    """Start a cluster, write a row and read it, check the tables' types, and stop the cluster.

    Parameters
    ----------
    cluster
        Specification of the cluster, as for `use_cluster`.
    limit
        The task's `execution_timeout`.

    Raises
    ------
    Exception
        The error of the first step that fails. The cluster is stopped then, too.
    """
    import polars as pl

    uri = f"{DATA}/results/preflight.parquet"
    row = pl.LazyFrame({"token": [uuid4().hex]})
    logger.info("Cost: from now on %s", describe_cost(cluster, limit))
    with ExitStack() as until_stopped:
        with _step("Start"):
            ctx = until_stopped.enter_context(use_cluster(cluster))
            start_and_wait(current_scope(), ctx)
            cluster_id = get_cluster_id(ctx)
            assert cluster_id is not None, "it is running"
            logger.info("Start: ok: cluster %s is running", cluster_id)
        with _step("Write"):
            row.remote(ctx).single_node().sink_parquet(uri).await_result()
            logger.info("Write: ok: a row to %s", uri)
        with _step("Read"):
            read = execute(pl.scan_parquet(uri), ctx)
            if not read.equals(row.collect()):
                raise RuntimeError(f"{uri} does not contain the row that was just written: {read}")
            logger.info("Read: ok: the same row")
        with _step("Tables"):
            logger.info("Tables: ok: %s", check_types(lambda query: execute(query, ctx)))
        with _step("Stop"):
            until_stopped.close()
            _wait_until_stopped(cluster_id)
            logger.info("Stop: ok: cluster %s has stopped", cluster_id)


def describe_cost(cluster: Cluster, limit: timedelta) -> str:
    """Return a text with the billed node and minutes, idle timeout included."""
    node = cluster.get("instance_type") or f"{cluster['cpus']} CPUs and {cluster['memory']} GB"
    minutes = limit.total_seconds() / 60 + cluster["idle_timeout_mins"]
    return f"one node ({node}) is billed for a few minutes, at most {minutes:.0f}"


def check_airflow() -> str:
    python = platform.python_version()
    if Version(python) < Version(OLDEST_PYTHON):
        raise AirflowFailException(
            f"This worker runs Python {python}: the DAGs need {OLDEST_PYTHON} or newer"
        )
    return f"{_name_release('Airflow', airflow_version)}, Python {python}"


def check_library() -> str:
    if hidden := find_hidden_copies():
        raise AirflowFailException(
            f"polars_remote is imported from {describe(FOLDER)}, which hides {', '.join(hidden)}: "
            "delete all but one"
        )
    return describe(FOLDER)


def check_client() -> str:
    try:
        client, installed = version("polars-cloud"), version("polars")
    except PackageNotFoundError as error:
        raise AirflowFailException(
            f"{error.name} is not installed on this worker: install requirements.txt there"
        ) from None
    [needed] = [
        requirement
        for requirement in map(Requirement, requires("polars-cloud") or ())
        if requirement.name == "polars"
    ]
    if installed not in needed.specifier:
        raise AirflowFailException(
            f"polars {installed} is installed, but polars-cloud {client} needs {needed}: "
            f"pip install polars-cloud=={client}"
        )
    import polars as pl

    if pl.get_index_type() != pl.UInt64:
        raise AirflowFailException(
            f"polars {installed} runs with 32-bit row numbers, which polars-cloud refuses: "
            f"pip install '{needed}', and unset POLARS_FORCE_PKG and POLARS_PREFER_PKG"
        )
    return f"{_name_release('polars-cloud', client)}, polars {installed}"


def check_data() -> str:
    check_data_location()
    return DATA


def check_tables() -> str:
    """Check the tables' types if this machine can read the files. Tasks do not need this access."""
    try:
        return check_types(lambda query: query.collect())
    except OSError as error:
        if "NoSuchBucket" in str(error):
            raise
        return f"not checked, as this machine cannot read them: {error}".partition("\n")[0]


def check_types(run: Callable[[pl.LazyFrame], pl.DataFrame]) -> str:
    """Check that each file has the columns and types of its table's schema.

    Parameters
    ----------
    run
        Function that runs a query on a machine that can read the files, and returns its rows.

    Raises
    ------
    AirflowFailException
        Not retried: a table has no files, or files have other types, which the message names.
    """
    checked = []
    for table, schema in get_schemas().items():
        types = _find_types(table, run)
        problems = defaultdict(list)
        for file, found in types.items():
            first, first_found = next(iter(types.items()))
            for column, wanted in schema.items():
                if column not in found:
                    problems[f"no column {column}, which must be {wanted}"].append(file)
                elif not fits([found[column]], wanted):
                    problems[f"{column} is {found[column]}, and must be {wanted}"].append(file)
                elif column in first_found and not fits(
                    [first_found[column], found[column]], wanted
                ):
                    problems[
                        f"{column} is {found[column]}, which does not fit "
                        f"{first_found[column]} of {first}, the first file"
                    ].append(file)
        if problems:
            listed = "; ".join(
                f"{file}{f' and {len(others)} more' if others else ''}: {problem}"
                for problem, (file, *others) in problems.items()
            )
            raise AirflowFailException(
                f"Table {table}: {listed}. Rewrite these files, or change the schema in "
                "include/shop.py"
            )
        run(scan(table).head(1))  # the first file may have no rows
        checked.append(f"{table} ({len(types)} files)")
    return f"{', '.join(checked)} have the types of their schemas"


def check_connection() -> str:
    connection = find_connection(CONN_ID)
    if isinstance(connection, Exception):
        raise connection
    return f"{CONN_ID} has type {connection.conn_type}, login {connection.login} and a password"


def check_login(session: CloudSession) -> str:
    session.log_in()
    return f"accepted by {'the emulator' if uses_emulator() else 'Polars Cloud'}"


def check_workspace(session: CloudSession) -> str:
    return session.find_workspace().name


def check_manifest(session: CloudSession) -> str:
    if not MANIFEST:
        raise AirflowFailException(
            "POLARS_CLOUD_MANIFEST is empty: set it to a name, or do not set it at all"
        )
    try:
        found = find_manifest(session, MANIFEST)
    except misspecified_error() as error:
        return f"the next task that uses {MANIFEST} registers it again: {error}"
    if found is None:
        return f"{MANIFEST} does not exist yet: the first task that uses it registers it"
    polars, python = version("polars"), platform.python_version()
    return f"{MANIFEST} fits this worker: polars {polars}, Python {python}"


def execute(query: pl.LazyFrame, ctx: ComputeContext) -> pl.DataFrame:
    """Run the query on the cluster, and return the first rows of its result."""
    head = query.remote(ctx).single_node().execute().head
    if head is None:
        raise RuntimeError("The query succeeded, but its reply has no rows")
    return head


def _find_types(
    table: str, run: Callable[[pl.LazyFrame], pl.DataFrame]
) -> dict[str, dict[str, pl.DataType]]:
    """Return the column types of each file that has rows, in the order of a scan."""
    import polars as pl
    from polars.exceptions import ComputeError

    uri = f"{DATA}/{table}/"
    # Reads no column, so it works with any types.
    rows = pl.scan_parquet(uri, include_file_paths="file", extra_columns="ignore")
    try:
        files = run(rows.select(pl.col("file").unique().sort().implode())).item().to_list()
    except ComputeError as error:
        if "expanded paths were empty" not in str(error):
            raise
        raise AirflowFailException(
            f"There is no file in {uri}: write the table there, or correct POLARS_CLOUD_DATA"
        ) from None
    types: dict[str, dict[str, pl.DataType]] = {file: {} for file in files}
    for start in range(0, len(files), FILES_PER_QUERY):
        # One row of nulls from each file, for its types.
        heads = [
            pl.scan_parquet(file, hive_partitioning=True)
            .head(0)
            .select(pl.all().first().name.prefix(f"{number} "))
            for number, file in enumerate(files[start : start + FILES_PER_QUERY], start)
        ]
        for name, kind in run(pl.concat(heads, how="horizontal")).schema.items():
            number, _, column = name.partition(" ")
            types[files[int(number)]][column] = kind
    return types


def fits(kinds: list[pl.DataType], wanted: pl.DataType | type[pl.DataType]) -> bool:
    """Return whether a scan accepts files with these types, in this order."""
    import polars as pl
    from polars.exceptions import PolarsError

    files = []
    for kind in kinds:
        pl.DataFrame({"column": [None]}, {"column": kind}).write_parquet(file := BytesIO())
        files.append(file.getvalue())
    try:
        scan_files(files, {"column": wanted}).collect()
    except PolarsError:
        return False
    return True


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Log the step's error in one line, advice first."""
    try:
        yield
    except Exception as error:
        add_advice(error)
        message = " ".join(str(error).split())
        advice = " ".join(getattr(error, "__notes__", ()))
        logger.error("%s: FAILED: %s", name, f"{advice} ({message})" if advice else message)
        raise


def _name_release(name: str, installed: str) -> str:
    tested = NEWEST_TESTED[name]
    is_newer = Version(installed).release[:2] > Version(tested).release
    return f"{name} {installed}" + (f" (tested up to {tested})" if is_newer else "")


def _wait_until_stopped(cluster_id: str) -> None:
    session = current_scope().session
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        status, _ = session.call(get_cluster_status, cluster_id, session.find_workspace())
        if status in ("STOPPED", "FAILED"):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"Cluster {cluster_id} is {status} {STOP_SECONDS:.0f} s after the request to stop: "
                "stop it in Polars Cloud, unless another preflight is using it"
            )
        time.sleep(1)
