"""The table of an Iceberg sink, whose files Polars writes and commits in the worker process."""

from importlib import import_module
from operator import attrgetter
from typing import Any

from polars_cloud_emulator.workers.sink_targets import check_uri


def table_location(sink: dict[str, Any]) -> str:
    """Return the location of a sink's table from its catalog.

    Raises
    ------
    InvalidRequest
        The table's files are not in an object store.
    """
    catalog_class = attrgetter(sink["py_catalog_class_qualname"])(
        import_module(sink["py_catalog_class_module"])
    )
    catalog = catalog_class(sink["catalog_name"], **sink["catalog_properties"])
    table = catalog.load_table(sink["table_name"])
    location: str = table.location()
    for uri in (location, table.properties.get("write.data.path", location)):
        check_uri(uri)
    return location
