"""Datasets of a task's queries, for OpenLineage."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from posixpath import dirname
from typing import TYPE_CHECKING, Any

from ..cloud.plans import Plan
from .record import Dataset, QueryRecord, Result

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

    Lineage = OperatorLineage[Any, Any]

MAX_INPUTS = 100
"""Maximum inputs of a query: the record holds them until the query has ended."""

SCHEMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
"""Schemes that OpenLineage names otherwise."""


def add_datasets(query: QueryRecord, plan: Plan) -> None:
    """Add what a query reads and writes to its record, if OpenLineage will ask for it.

    Airflow loads the provider's plugin before the task's function is called.
    """
    if "airflow.providers.openlineage" in sys.modules:
        found = (name_dataset(path) for paths in plan.scans for path in merge_files(paths))
        inputs = ((namespace, without_pattern(name)) for namespace, name in found)
        query.inputs = [*dict.fromkeys(inputs)][:MAX_INPUTS]
        query.outputs = [name_dataset(destination) for destination in plan.destinations]


def report_datasets(queries: Iterable[tuple[QueryRecord, Result | None]]) -> Lineage:
    """Return inputs of the queries, and outputs and rows of those that have succeeded."""
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import InputDataset, OutputDataset
    from openlineage.client.facet_v2 import output_statistics_output_dataset

    inputs: dict[Dataset, InputDataset] = {}
    outputs: dict[Dataset, OutputDataset] = {}
    for query, result in queries:
        for namespace, name in query.inputs or []:
            inputs[namespace, name] = InputDataset(namespace, name)
        if result is None:
            continue
        # A temporary result has no destination.
        written = query.outputs or [name_dataset(each) for each in merge_files(result.location)]
        for namespace, name in written:
            output = outputs[namespace, name] = OutputDataset(namespace, name)
            # The rows of several outputs cannot be told apart.
            if len(written) == 1 and result.rows is not None:
                output.outputFacets = {
                    "outputStatistics": (
                        output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                            rowCount=result.rows, fileCount=len(result.location)
                        )
                    )
                }
    return OperatorLineage(inputs=[*inputs.values()], outputs=[*outputs.values()])


def merge_files(paths: Sequence[str]) -> list[str]:
    """Replace several paths in one folder by the folder."""
    files = Counter(map(dirname, paths))
    merged = (path if files[dirname(path)] == 1 else dirname(path) for path in paths)
    return [*dict.fromkeys(merged)]


def name_dataset(uri: str) -> Dataset:
    """Return namespace and name of a file or folder, as OpenLineage's naming page has them.

    Credentials in a web address are left out.
    """
    scheme, _, rest = uri.partition("://") if "://" in uri else ("", "", uri)
    host, _, path = rest.partition("/")
    if scheme in ("", "file"):
        return "file", rest.rstrip("/") or "/"
    if scheme in ("http", "https"):
        host, path = host.rpartition("@")[2], re.split("[?#]", path)[0]
    return f"{SCHEMES.get(scheme, scheme)}://{host}", path.strip("/") or "/"


def without_pattern(name: str) -> str:
    """Return the folder of a name with wildcards."""
    parts = name.split("/")
    wild = (number for number, part in enumerate(parts) if any(each in part for each in "*?["))
    return "/".join(parts[: next(wild, None)]) or "/"
