"""Checks of a plan at submission: plans that would fail, or lose their rows, are refused."""

from collections.abc import Mapping

from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.model.specs import ClusterSpec
from polars_cloud_emulator.workers.plan import Document
from polars_cloud_emulator.workers.requirements import declared_distributions
from polars_cloud_emulator.workers.sink_targets import OTHERS, TEMPORARY, Node, check_uri, uri_of

TO_CLIENT = "<flight>"
"""Target of a result that the client would fetch from the cluster."""
ICEBERG = {"pyiceberg", "pyarrow"}
"""Distributions that Polars needs to commit to an Iceberg table."""


def check(document: Document, spec: ClusterSpec, *, only_planned: bool) -> None:
    """Check a plan.

    Parameters
    ----------
    spec
        Specification of the cluster.
    only_planned
        True if the plan is only optimized, not run.

    Raises
    ------
    InvalidRequest
        The plan would fail on the cluster, or its rows would be lost.
    """
    for source in document.scan_sources():
        check_credentials(source.uri, source.cloud_options, spec.env_vars)
    places: set[str] = set()
    for payload in (sink["payload"] for sink in document.sinks()):
        if "Iceberg" in payload and not declared_distributions(spec.requirements_txt) >= ICEBERG:
            raise InvalidRequest(
                "sink_iceberg commits to the catalog on a worker, which needs pyiceberg and "
                "PyArrow: add 'pyiceberg[pyarrow]' to the requirements of the ComputeContext"
            )
        uri = uri_of(payload)
        if uri is None or uri == TEMPORARY or (uri == TO_CLIENT and only_planned):
            continue
        if uri == TO_CLIENT:
            raise InvalidRequest(
                "collect() and collect_batches() are not supported: the emulator does not send "
                "rows to the client. Use execute() and its result's lazy(), or write to a bucket"
            )
        check_uri(uri)
        if uri.rstrip("/") in places:
            raise InvalidRequest(
                f"two sinks of this query write to '{uri}', and one would replace the files of "
                "the other: give each sink its own folder"
            )
        places.add(uri.rstrip("/"))
        [sink] = payload.values()
        check_credentials(uri, sink["unified_sink_args"]["cloud_options"], spec.env_vars)


def check_credentials(uri: str, cloud_options: Node | None, env_vars: Mapping[str, str]) -> None:
    """Check that the workers have credentials for a URI of Google Cloud or Azure.

    Parameters
    ----------
    cloud_options
        ``storage_options`` and ``credential_provider`` of the scan or sink.
    env_vars
        Environment variables of the cluster.

    Raises
    ------
    InvalidRequest
        The workers have no credentials.
    """
    prefix = OTHERS.get(uri.partition("://")[0])
    if prefix is None or any(name.startswith(prefix) for name in env_vars):
        return
    match cloud_options:
        case {"config": {"Gcp": [_, *_]} | {"Azure": [_, *_]}}:
            return
        # "auto" uses the credentials of the machine. A cluster has none, though this machine may.
        case {"credential_provider": {"Builder": provider}} if b"AutoInit" not in bytes(provider):
            return
    raise InvalidRequest(
        f"the workers have no credentials for '{uri}': pass them in storage_options, with a "
        f"function as credential_provider, or as {prefix}* in env_vars of the ComputeContext"
    )
