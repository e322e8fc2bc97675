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
"""Maximum inputs per query, because the record holds them until the query has ended."""

SCHEMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
"""OpenLineage's names of schemes that have other names in URIs."""


def add_datasets(query: QueryRecord, plan: Plan) -> None:
    """Add the datasets that a query reads and writes to its record, if OpenLineage is in use.

    `sys.modules` then has the provider, because Airflow loads the provider's plugin before it calls
    the task's function.
    """
    if "airflow.providers.openlineage" in sys.modules:
        found = (name_dataset(path) for paths in plan.scans for path in merge_files(paths))
        inputs = ((namespace, without_pattern(name)) for namespace, name in found)
        query.inputs = [*dict.fromkeys(inputs)][:MAX_INPUTS]
        query.outputs = [name_dataset(destination) for destination in plan.destinations]


def report_datasets(queries: Iterable[tuple[QueryRecord, Result | None]]) -> Lineage:
    """Return the inputs of all queries, and the outputs and row counts of successful ones."""
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
            # With several outputs, the rows of each are unknown.
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
    """Return the paths; two or more paths in one folder are replaced by the folder."""
    files = Counter(map(dirname, paths))
    merged = (path if files[dirname(path)] == 1 else dirname(path) for path in paths)
    return [*dict.fromkeys(merged)]


def name_dataset(uri: str) -> Dataset:
    """Return namespace and name of a file or folder, by OpenLineage's naming conventions.

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
    """Return the name up to its first part with a wildcard."""
    parts = name.split("/")
    wild = (number for number, part in enumerate(parts) if any(each in part for each in "*?["))
    return "/".join(parts[: next(wild, None)]) or "/"
