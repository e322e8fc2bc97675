"""What a plan is refused for at submission: it would fail on its cluster, or leave nothing."""

from collections.abc import Mapping

from polars_cloud_emulator.model.errors import InvalidRequest
from polars_cloud_emulator.model.specs import ClusterSpec
from polars_cloud_emulator.workers.plan import Document
from polars_cloud_emulator.workers.requirements import declared_distributions
from polars_cloud_emulator.workers.sink_targets import OTHERS, TEMPORARY, Node, check_uri, uri_of

TO_CLIENT = "<flight>"
"""Target of a result that the client fetches from the cluster."""
ICEBERG = {"pyiceberg", "pyarrow"}
"""What Polars commits to an Iceberg table with."""


def check(document: Document, spec: ClusterSpec, *, only_planned: bool) -> None:
    """Refuse the plan, or let it pass.

    Parameters
    ----------
    spec
        Of the cluster that is to run it.
    only_planned
        Whether nothing of it will run.

    Raises
    ------
    InvalidRequest
        With what is wrong, and what to do.
    """
    for source in document.scan_sources():
        check_credentials(source.uri, source.cloud_options, spec.env_vars)
    places: set[str] = set()
    for payload in (sink["payload"] for sink in document.sinks()):
        if "Iceberg" in payload and not declared_distributions(spec.requirements_txt) >= ICEBERG:
            raise InvalidRequest(
                "sink_iceberg commits to the catalog on a worker, which needs pyiceberg and "
                "PyArrow: declare them in the requirements of the ComputeContext, as in "
                "'pyiceberg[pyarrow]'"
            )
        uri = uri_of(payload)
        if uri is None or uri == TEMPORARY or (uri == TO_CLIENT and only_planned):
            continue
        if uri == TO_CLIENT:
            raise InvalidRequest(
                "collect() and collect_batches() are refused: the emulator sends no rows to its "
                "client. Use execute() and its result's lazy(), or write to a bucket"
            )
        check_uri(uri)
        if uri.rstrip("/") in places:
            raise InvalidRequest(
                f"two sinks of this query write to '{uri}', and one would replace the other's "
                "files: give each its own folder"
            )
        places.add(uri.rstrip("/"))
        [sink] = payload.values()
        check_credentials(uri, sink["unified_sink_args"]["cloud_options"], spec.env_vars)


def check_credentials(uri: str, cloud_options: Node | None, env_vars: Mapping[str, str]) -> None:
    """Refuse a Google or Azure address that the workers have no credentials for.

    Parameters
    ----------
    cloud_options
        Of the scan or sink: what its ``storage_options`` and ``credential_provider`` say.
    env_vars
        Of the cluster.

    Raises
    ------
    InvalidRequest
        With where to put the credentials.
    """
    prefix = OTHERS.get(uri.partition("://")[0])
    if prefix is None or any(name.startswith(prefix) for name in env_vars):
        return
    match cloud_options:
        case {"config": {"Gcp": [_, *_]} | {"Azure": [_, *_]}}:
            return
        # "auto" looks for those of the machine that it runs on. A cluster has none, this one may.
        case {"credential_provider": {"Builder": provider}} if b"AutoInit" not in bytes(provider):
            return
    raise InvalidRequest(
        f"the workers have no credentials for '{uri}': give them in storage_options, by a function "
        f"as credential_provider, or as {prefix}* in env_vars of the ComputeContext"
    )
