"""Column types of the shop's files: right rows, or an error that names the column."""

import importlib
import sys
from collections.abc import Callable
from datetime import date, timedelta
from types import ModuleType

import boto3
import polars as pl
import pytest
from polars.exceptions import PolarsError
from polars.testing import assert_frame_equal

from include import preflight, shop
from polars_cloud_emulator.sample_data import shop_tables
from polars_cloud_emulator.testing import RunningEmulator
from polars_remote import use_cluster
from polars_remote.compat.versions import AirflowFailException
from tests.buckets import create_bucket_of_others
from tests.tries import StartTry

DAY = date(2026, 11, 23)
DATA = "s3://your-bucket/typed"
RESULT = f"{DATA}/results/numbers.parquet"
CLUSTER = {"name": "airflow-schemas", "cpus": 2, "memory": 4, "idle_timeout_mins": 10}

Edit = Callable[[pl.DataFrame], pl.DataFrame]

pytestmark = pytest.mark.usefixtures("pc")


@pytest.fixture(scope="module")
def tables() -> dict[str, pl.DataFrame]:
    """Two days of the sample data; `sales` without odd quantities."""
    days = pl.col("date") > DAY - timedelta(days=2)
    tables = {name: table.filter(days) for name, table in shop_tables(DAY).items()}
    return {**tables, "sales": tables["sales"].filter(pl.col("quantity") > 0)}


@pytest.fixture
def write(
    emulator: RunningEmulator, monkeypatch: pytest.MonkeyPatch, tables: dict[str, pl.DataFrame]
) -> Callable[..., None]:
    """Write the tables to the data location, `sales` as two files."""
    monkeypatch.setattr(shop, "DATA", DATA)
    monkeypatch.setattr(preflight, "DATA", DATA)

    def write(first: pl.DataFrame, later: pl.DataFrame) -> None:
        first.write_parquet(f"{DATA}/sales/1.parquet")
        later.write_parquet(f"{DATA}/sales/2.parquet")
        for name in ("inventory", "returns"):
            tables[name].write_parquet(f"{DATA}/{name}/1.parquet")

    return write


def sum_sales(sales: pl.LazyFrame) -> pl.LazyFrame:
    """Return a query that reads a column of each type of the schema."""
    return (
        sales.filter(pl.col("date") == DAY, pl.col("status") == "completed")
        .group_by("product")
        .agg(
            orders=pl.n_unique("order_id"),
            units=pl.sum("quantity"),
            revenue=(pl.col("quantity") * pl.col("unit_price")).sum(),
        )
        .sort("product")
    )


def cast(column: str, kind: pl.DataType | type[pl.DataType]) -> Edit:
    return lambda sales: sales.with_columns(pl.col(column).cast(kind))


def date_as(kind: pl.Datetime, hour: int = 0) -> Edit:
    """Return an expression for a time on that date, in the type's time zone."""
    moment = pl.col("date").cast(pl.Datetime(kind.time_unit)) + pl.duration(hours=hour)
    return lambda sales: sales.with_columns(date=moment.dt.replace_time_zone(kind.time_zone))


def categories(sales: pl.DataFrame) -> pl.DataFrame:
    return sales.with_columns(
        pl.Series(name, sales[name], pl.Categorical) for name in ("status", "product", "region")
    )


def enums(sales: pl.DataFrame) -> pl.DataFrame:
    statuses = sales["status"].unique(maintain_order=True)
    return sales.with_columns(pl.Series("status", sales["status"], pl.Enum(statuses)))


def null(column: str) -> Edit:
    return lambda sales: sales.with_columns(pl.lit(None).alias(column))


def unchanged(sales: pl.DataFrame) -> pl.DataFrame:
    return sales


def without_rows(sales: pl.DataFrame) -> pl.DataFrame:
    return sales.clear()


def with_more_columns(sales: pl.DataFrame) -> pl.DataFrame:
    return sales.with_columns(channel=pl.lit("web"), stamp=pl.lit(DAY).cast(pl.Datetime))


def in_another_order(sales: pl.DataFrame) -> pl.DataFrame:
    return sales.select(reversed(sales.columns))


EVERYWHERE_RIGHT: dict[str, Edit] = {
    "the schema's types": unchanged,
    "further columns": with_more_columns,
    "another order of columns": in_another_order,
    "a file without rows": without_rows,
}

RIGHT_IN_ALL_FILES: dict[str, Edit] = {
    **EVERYWHERE_RIGHT,
    **{
        f"date {unit} {zone}": date_as(pl.Datetime(unit, zone), hour)
        for unit in ("ms", "us", "ns")
        for zone, hour in ((None, 0), ("UTC", 23), ("Asia/Tokyo", 1), ("America/New_York", 23))
    },
    **{
        f"quantity {kind}": cast("quantity", kind)
        for kind in (pl.Int8, pl.Int16, pl.Int32, pl.UInt8, pl.UInt16, pl.UInt32)
    },
    "categories": categories,
    "enums": enums,
}

RIGHT_IN_A_LATER_FILE: dict[str, Edit] = {
    **EVERYWHERE_RIGHT,
    **{f"quantity {kind}": cast("quantity", kind) for kind in (pl.Int8, pl.Int32, pl.UInt32)},
    "categories": categories,
    "no customers": null("customer_id"),
}

FIRST = f"{DATA}/sales/1.parquet"
LATER = f"{DATA}/sales/2.parquet"

REFUSED_IN_ALL_FILES: dict[str, tuple[Edit, str]] = {
    "a date as text": (cast("date", pl.String), "date is String, and must be Date"),
    "a date as number": (cast("date", pl.Int32), "date is Int32, and must be Date"),
    "a date without values": (null("date"), "date is Null, and must be Date"),
    **{
        f"quantity {kind}": (cast("quantity", kind), f"quantity is {kind}, and must be Int64")
        for kind in (pl.UInt64, pl.Int128, pl.Float32, pl.Float64, pl.Decimal(10, 2), pl.String)
    },
    **{
        f"unit_price {kind}": (
            cast("unit_price", kind),
            f"unit_price is {kind}, and must be {pl.Decimal(10, 2)}",
        )
        for kind in (pl.Int64, pl.Float64, pl.Decimal(10, 3), pl.Decimal(12, 2), pl.String)
    },
    "a status as number": (
        lambda sales: sales.with_columns(status=pl.lit(1)),
        "status is Int32, and must be String",
    ),
    "a missing column": (
        lambda sales: sales.drop("quantity"),
        "no column quantity, which must be Int64",
    ),
}

REFUSED_IN_THE_FIRST_FILE: dict[str, tuple[Edit, str]] = {
    "a moment": (
        date_as(pl.Datetime("us")),
        f"{LATER}: date is Date, which does not fit {pl.Datetime('us')} of {FIRST}",
    ),
    "a narrower integer": (
        cast("quantity", pl.Int32),
        f"{LATER}: quantity is Int64, which does not fit Int32 of {FIRST}",
    ),
    "categories": (categories, f"{LATER}: region is String, which does not fit Categorical of"),
    "no products": (
        null("product"),
        f"{LATER}: product is String, which does not fit Null of {FIRST}",
    ),
}

REFUSED_IN_A_LATER_FILE: dict[str, tuple[Edit, str]] = {
    "a moment": (
        date_as(pl.Datetime("us")),
        f"{LATER}: date is {pl.Datetime('us')}, which does not fit Date of {FIRST}",
    ),
    **{
        name: (edit, f"{LATER}: {problem}")
        for name, (edit, problem) in REFUSED_IN_ALL_FILES.items()
        if name != "a date without values"  # the file has no row
    },
}


def in_all_files(edit: Edit, sales: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    edited = edit(sales)
    middle = edited.height // 2
    return edited[:middle], edited[middle:]


def in_first_file(edit: Edit, sales: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    middle = sales.height // 2
    return edit(sales[:middle]), sales[middle:]


def in_later_file(edit: Edit, sales: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    middle = sales.height // 2
    return sales[:middle], edit(sales[middle:])


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize(
    ("place", "edits"),
    [
        (in_all_files, RIGHT_IN_ALL_FILES),
        (in_first_file, EVERYWHERE_RIGHT),
        (in_later_file, RIGHT_IN_A_LATER_FILE),
    ],
)
def test_these_types_give_the_rows_of_the_schemas_own(
    write: Callable[..., None],
    tables: dict[str, pl.DataFrame],
    place: Callable[..., tuple[pl.DataFrame, pl.DataFrame]],
    edits: dict[str, Edit],
) -> None:
    with use_cluster(CLUSTER) as ctx:
        for number, (name, edit) in enumerate(edits.items()):
            result = f"{DATA}/results/{number}.parquet"
            write(*place(edit, tables["sales"]))
            rows = place(edit if edit is without_rows else unchanged, tables["sales"])
            expected = sum_sales(pl.concat(rows).lazy()).collect()
            assert preflight.check_tables().startswith("sales ("), name
            query = sum_sales(shop.scan("sales")).remote(ctx).single_node()
            query.sink_parquet(result).await_result()
            assert_frame_equal(pl.read_parquet(result), expected)


@pytest.mark.usefixtures("ti")
@pytest.mark.parametrize(
    ("place", "edits"),
    [
        (in_all_files, REFUSED_IN_ALL_FILES),
        (in_first_file, REFUSED_IN_THE_FIRST_FILE),
        (in_later_file, REFUSED_IN_A_LATER_FILE),
    ],
)
def test_these_types_are_refused_with_file_column_and_types(
    write: Callable[..., None],
    tables: dict[str, pl.DataFrame],
    place: Callable[..., tuple[pl.DataFrame, pl.DataFrame]],
    edits: dict[str, tuple[Edit, str]],
) -> None:
    with use_cluster(CLUSTER) as ctx:
        for edit, problem in edits.values():
            write(*place(edit, tables["sales"]))
            with pytest.raises(AirflowFailException) as here:
                preflight.check_tables()
            assert problem in str(here.value)
            assert f"{DATA}/sales/" in str(here.value)
            query = sum_sales(shop.scan("sales")).remote(ctx).single_node()
            with pytest.raises(PolarsError):
                query.execute()


@pytest.mark.usefixtures("ti")
def test_a_cluster_finds_what_this_machine_finds(
    emulator: RunningEmulator, write: Callable[..., None], tables: dict[str, pl.DataFrame]
) -> None:
    def check(query: pl.LazyFrame) -> pl.DataFrame:
        return preflight.execute(query, ctx)

    with use_cluster(CLUSTER) as ctx:
        write(*in_all_files(unchanged, tables["sales"]))
        assert preflight.check_types(check) == preflight.check_tables()
        write(*in_later_file(date_as(pl.Datetime("us")), tables["sales"]))
        with pytest.raises(AirflowFailException) as here:
            preflight.check_tables()
        with pytest.raises(AirflowFailException) as on_a_cluster:
            preflight.check_types(check)
    assert str(on_a_cluster.value) == str(here.value)


@pytest.mark.usefixtures("ti")
def test_a_table_without_files_is_refused_and_not_read_as_one_without_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (shop, preflight):
        monkeypatch.setattr(module, "DATA", "s3://your-bucket/nowhere")
    problem = "There is no file in s3://your-bucket/nowhere/sales/: write the table there"
    with pytest.raises(AirflowFailException, match=problem):
        preflight.check_tables()
    with use_cluster(CLUSTER) as ctx:
        with pytest.raises(AirflowFailException, match=problem):
            preflight.check_types(lambda query: preflight.execute(query, ctx))
        with pytest.raises(PolarsError, match="expanded paths were empty"):
            sum_sales(shop.scan("sales")).remote(ctx).single_node().execute()


def test_what_this_machine_cannot_read_is_left_to_the_cluster(
    monkeypatch: pytest.MonkeyPatch, tables: dict[str, pl.DataFrame]
) -> None:
    boto3.client("s3").create_bucket(Bucket="tables-of-others")
    tables["sales"].write_parquet("s3://tables-of-others/sales/1.parquet")
    create_bucket_of_others("tables-of-others")
    for module in (shop, preflight):
        monkeypatch.setattr(module, "DATA", "s3://tables-of-others")
    assert preflight.check_tables().startswith("not checked, as this machine cannot read them: ")


def test_files_are_reported_once_for_each_problem(
    write: Callable[..., None], tables: dict[str, pl.DataFrame]
) -> None:
    write(*in_all_files(cast("date", pl.String), tables["sales"]))
    with pytest.raises(AirflowFailException) as refused:
        preflight.check_tables()
    assert str(refused.value) == (
        f"Table sales: {FIRST} and 1 more: date is String, and must be Date. "
        "Rewrite these files, or change the schema in include/shop.py"
    )


def double(numbers: pl.Series) -> pl.Series:
    return numbers * 2


def run_function(function: Callable[[pl.Series], pl.Series]) -> None:
    numbers = pl.LazyFrame({"x": [1]}).select(pl.col("x").map_batches(function, pl.Int64))
    with use_cluster(CLUSTER) as ctx:
        numbers.remote(ctx).single_node().sink_parquet(RESULT).await_result()


@pytest.mark.parametrize("module", ["include.shop", "tests.test_schemas", "dags.helpers"])
def test_a_function_of_a_module_that_the_cluster_does_not_have_is_explained(
    start_try: StartTry, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    package, _, _ = module.partition(".")
    helpers = sys.modules.get(module) or ModuleType(module)
    monkeypatch.setitem(sys.modules, module, helpers)
    monkeypatch.setattr(helpers, "double", double, raising=False)
    monkeypatch.setattr(double, "__module__", module)
    with pytest.raises(ModuleNotFoundError) as raised, start_try():
        run_function(double)
    assert raised.value.__notes__ == [
        f"A function of the query imports the module {package}, which is not installed on the "
        "cluster: define what the function needs inside the task, or add the package to the "
        "cluster's requirements"
    ]


def test_a_function_that_is_defined_inside_the_task_needs_no_module(start_try: StartTry) -> None:
    def task() -> None:
        factor = 2
        run_function(lambda numbers: numbers * factor)

    with start_try():
        task()
    assert pl.read_parquet(RESULT)["x"].to_list() == [2]


def test_an_import_that_fails_in_the_task_itself_is_not_laid_to_the_cluster(
    start_try: StartTry,
) -> None:
    with pytest.raises(ModuleNotFoundError) as raised, start_try():
        importlib.import_module("nowhere_to_be_found")
    assert not hasattr(raised.value, "__notes__")


def test_a_table_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(AirflowFailException, match=r"no table 'sale' in .+ There are sales, inv"):
        shop.scan("sale")
