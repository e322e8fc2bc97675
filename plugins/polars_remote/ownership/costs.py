"""Cost of a run's use of clusters.

Polars Cloud reports when a cluster was requested and when it stopped. While several runs use the
cluster, each is charged an equal share. Time in which no run used the cluster is charged to the run
that stopped the cluster, from the run's first use on. Otherwise, as in an idle timeout, it is
charged to no run.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from ..cloud.client import ClusterBill, get_cluster_bill
from ..cloud.retry import time_left
from ..cloud.session import CloudSession
from ..settings import PRICE
from .record import ClusterUse

logger = logging.getLogger(__name__)

STOP_WAIT_SECONDS = 10.0
"""Maximum seconds to wait until a cluster has stopped. Before that, its cost is not final."""

Span = tuple[float, float]
"""Start and end of a use, in seconds since the epoch."""

Cost = dict[str, Any]
"""Cost of a run's use of one cluster, as plain JSON; see `describe_cost`."""


def log_costs(
    session: CloudSession,
    uses: Sequence[ClusterUse],
    others: Collection[ClusterUse],
    *,
    is_last: bool,
    waits_for_stop: bool,
) -> list[Cost]:
    """Log and return the cost of a run's uses of a manifest's clusters; never raises.

    Parameters
    ----------
    uses
        Uses of the run whose cost was not logged yet.
    others
        Uses of other runs, and uses of this run whose cost was logged.
    is_last
        Whether the run was the cluster's last user.
    waits_for_stop
        Whether to wait a few seconds until the cluster has stopped.
    """
    return [
        _log_cost(session, cluster_id, uses, others, is_last=is_last, waits_for_stop=waits_for_stop)
        for cluster_id in dict.fromkeys(each for use in uses for each in use.clusters)
    ]


def _log_cost(
    session: CloudSession,
    cluster_id: str,
    uses: Sequence[ClusterUse],
    others: Collection[ClusterUse],
    *,
    is_last: bool,
    waits_for_stop: bool,
) -> Cost:
    use = uses[0]
    try:
        # A task that leaves its cluster to the idle timeout makes no call for this.
        bill = None if others else _get_recorded_bill(use, cluster_id)
        bill = bill or _get_bill(session, cluster_id, waits_for_stop=waits_for_stop)
        now = time.time()
        mine = _get_spans(cluster_id, uses, now)
        of_runs = defaultdict[str, list[ClusterUse]](list)
        for other in others:
            of_runs[other.owner.run].append(other)
        spans = [_get_spans(cluster_id, each, now) for each in of_runs.values()]
        takes_rest = is_last and bill.stopped_at is not None
        ends = bill.stopped_at or now
        seconds = get_share(mine, spans, bill.started_at, ends, takes_rest=takes_rest)
        cost = describe_cost(use, cluster_id, bill, seconds, is_shared=any(spans))
    except Exception as error:
        cost = describe_unknown(use, cluster_id, " ".join(str(error).split()))
    size = f"{cost['nodes']} nodes, {cost['vcpus']} vCPUs, {cost['minutes']} min"
    money = "" if cost["money"] is None else f", {cost['money']} at {PRICE} per vCPU-hour"
    logger.info(
        "Cost of cluster %s of manifest %s in run %s of %s: %s%s%s",
        cluster_id,
        use.manifest,
        use.owner.run_id,
        use.owner.dag_id,
        "" if cost["minutes"] is None else f"{size}, {cost['vcpu_hours']} vCPU-hours",
        money,
        f" ({cost['remark']})" if cost["remark"] else "",
    )
    return cost


def describe_cost(
    use: ClusterUse, cluster_id: str, bill: ClusterBill, seconds: float, *, is_shared: bool
) -> Cost:
    """Return the cost as plain JSON.

    `minutes`, `vcpu_hours` and `money` are this run's share. `started` and `stopped` are the
    cluster's own times. Unknown values are None.
    """
    hours = None if bill.vcpus is None else bill.vcpus * seconds / 3600
    remarks = ["shared with other runs"] if is_shared else []
    if bill.vcpus is None:
        remarks.append("Polars Cloud does not report the vCPUs")
    if bill.stopped_at is None:
        remarks.append(f"so far: the cluster is {bill.status.lower()}")
    return {
        "cluster": cluster_id,
        "manifest": use.manifest,
        "nodes": bill.nodes,
        "vcpus": bill.vcpus,
        "started": _format(bill.started_at),
        "stopped": None if bill.stopped_at is None else _format(bill.stopped_at),
        "minutes": round(seconds / 60, 4),
        "vcpu_hours": None if hours is None else round(hours, 6),
        "money": None if hours is None or PRICE is None else round(hours * PRICE, 6),
        "remark": "; ".join(remarks),
    }


def describe_unknown(use: ClusterUse, cluster_id: str, reason: str) -> Cost:
    """Return an unknown cost as plain JSON, with the reason as its remark."""
    keys = ("nodes", "vcpus", "started", "stopped", "minutes", "vcpu_hours", "money")
    return {
        "cluster": cluster_id,
        "manifest": use.manifest,
        **dict.fromkeys(keys),
        "remark": f"not known: {reason}",
    }


def get_share(
    mine: Collection[Span],
    others: Iterable[Collection[Span]],
    begins: float,
    ends: float,
    *,
    takes_rest: bool,
) -> float:
    """Return a run's share of a cluster's seconds.

    Parameters
    ----------
    mine
        Spans in which the run used the cluster.
    others
        Spans in which each of the other runs used the cluster.
    begins, ends
        Start of the cluster, and its stop, or now if it has not stopped.
    takes_rest
        Whether the run is also charged for time in which no run used the cluster, after its own
        first use.
    """
    runs = [mine, *others]
    mine_begins = min((begin for begin, _ in mine), default=ends)
    edges = {min(max(edge, begins), ends) for run in runs for span in run for edge in span}
    seconds = 0.0
    for begin, end in itertools.pairwise(sorted({begins, ends, *edges})):
        using = [any(a <= begin and end <= b for a, b in run) for run in runs]
        if using[0]:
            seconds += (end - begin) / sum(using)
        elif takes_rest and not any(using) and begin >= mine_begins:
            seconds += end - begin
    return seconds


def _get_spans(cluster_id: str, uses: Iterable[ClusterUse], now: float) -> list[Span]:
    return [
        (use.clusters[cluster_id], use.until or now) for use in uses if cluster_id in use.clusters
    ]


def _get_recorded_bill(use: ClusterUse, cluster_id: str) -> ClusterBill | None:
    """Return the bill so far, from the record, if the cluster is left to its idle timeout."""
    if use.stops or use.seen_at is None or cluster_id != list(use.clusters)[-1]:
        return None
    return ClusterBill("LEFT TO ITS IDLE TIMEOUT", use.seen_at, None, use.nodes, use.vcpus)


def _get_bill(session: CloudSession, cluster_id: str, *, waits_for_stop: bool) -> ClusterBill:
    """Return the cluster's bill. With `waits_for_stop`, wait some seconds for the final one."""
    deadline = time.monotonic()
    if waits_for_stop and time_left(math.inf) == math.inf:  # a task that is killed does not wait
        deadline += STOP_WAIT_SECONDS
    while True:
        bill = session.call(get_cluster_bill, cluster_id, session.find_workspace())
        if bill.status != "STOPPING" or time.monotonic() > deadline:
            return bill
        time.sleep(0.5)


def _format(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
