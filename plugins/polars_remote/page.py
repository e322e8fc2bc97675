"""HTML page of the clusters and queries in use. Reads only the record; never calls Polars Cloud."""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit

from .compat.internals import (
    TASK_ENDS,
    find_states,
    find_variables,
    require_access_to_variables,
)
from .compat.versions import LISTS_VARIABLES
from .ownership import record
from .ownership.record import ClusterUse, Owner, QueryRecord, TaskRecord

if TYPE_CHECKING:
    from fastapi import FastAPI

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem;
  color: #1d2530; background: #f6f7f9; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 0 }
section { background: #fff; border: 1px solid #d8dde4; border-radius: 6px; padding: 1rem;
  margin: 1rem 0 }
p { margin: .25rem 0 } ul { margin: .25rem 0; padding-left: 1.25rem } a { color: #0b5cad }
.orphan { border-left: 4px solid #c2410c; padding-left: .75rem } .quiet { color: #596577 }
@media (prefers-color-scheme: dark) { body { color: #e3e7ec; background: #14181d }
  section { background: #1d232a; border-color: #38414c } a { color: #7db7f5 }
  .quiet { color: #9aa6b4 } }
"""

ENDED_BY = (
    "the triggerer, within two minutes, or clean_up at the end of the run"
    if LISTS_VARIABLES
    else "clean_up at the end of the run, the task's next try, or the next user of the cluster"
)


class InUse(NamedTuple):
    """Content of the record.

    Attributes
    ----------
    uses, tasks
        Entries of cluster uses and of tasks.
    unread
        Keys of entries that cannot be read.
    """

    uses: list[ClusterUse]
    tasks: list[TaskRecord]
    unread: list[str]


@functools.cache
def app() -> FastAPI:
    """Return the page's application, for users who may read Airflow's Variables."""
    from fastapi import Depends, FastAPI
    from fastapi.responses import HTMLResponse

    api = FastAPI(openapi_url=None, dependencies=[Depends(require_access_to_variables())])
    headers = {
        "cache-control": "no-store",
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    }

    @api.get("/", response_class=HTMLResponse)
    def show() -> HTMLResponse:
        return HTMLResponse(render(read_record(), time.time()), headers=headers)

    return api


def read_record() -> InUse:
    """Return the record, read from Airflow's database."""
    found = InUse([], [], [])
    for key, value in sorted(find_variables(f"{record.PREFIX}/").items()):
        try:
            if key.startswith(record.CLUSTERS):
                found.uses.append(ClusterUse.load(json.loads(value)))
            elif key.startswith(record.TASKS):
                found.tasks.append(TaskRecord.load(json.loads(value)))
        except (AttributeError, KeyError, TypeError, ValueError):
            found.unread.append(key)
    return found


def render(found: InUse, now: float) -> str:
    """Return the HTML of the page. `now` is in seconds since the epoch."""
    uses = [use for use in found.uses if use.until is None]
    manifests = {use.manifest for use in uses}
    manifests |= {each.manifest for task in found.tasks for each in task.queries.values()}
    states = functools.cache(find_states)

    def is_active(owner: Owner) -> bool:
        of_run = states(owner.dag_id, owner.run_id)
        task = owner.task_id, owner.map_index
        of_owner = of_run.values() if owner.whole_run else (of_run[task],) if task in of_run else ()
        return not set(of_owner) <= TASK_ENDS

    sections = []
    for manifest in sorted(manifests):
        of_manifest = [use for use in uses if use.manifest == manifest]
        queries = defaultdict[Owner, list[QueryRecord]](list)
        for task in found.tasks:
            for query in task.queries.values():
                if query.manifest == manifest:
                    queries[task.owner].append(query)
        owners = dict.fromkeys([use.owner for use in of_manifest] + list(queries))
        parts = [_render_cluster(manifest, of_manifest, now)]
        for owner in owners:
            seen_at = next((use.seen_at for use in of_manifest if use.owner == owner), None)
            parts.append(_render_owner(owner, seen_at, queries[owner], is_active(owner)))
        sections.append(f"<section>{''.join(parts)}</section>")
    sections += [
        f"<section class=orphan>Entry {escape(key)} cannot be read. Open it under Admin, "
        "Variables.</section>"
        for key in found.unread
    ]
    content = "".join(sections) or "<section>No query or cluster is in use.</section>"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>Polars Cloud</title>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta http-equiv=refresh content=30>"
        f"<style>{STYLE}</style></head><body><h1>Polars Cloud: in use</h1>"
        f"<p class=quiet>As recorded by the DAGs, at {_format_time(now)}. "
        f"<a href='../'>Airflow</a></p>{content}</body></html>"
    )


def _render_cluster(manifest: str, uses: Iterable[ClusterUse], now: float) -> str:
    """Return the HTML of a manifest's clusters: size, start and vCPU-hours so far."""
    lines = [f"<h2>{escape(manifest)}</h2>"]
    latest: dict[str, list[ClusterUse]] = defaultdict(list)
    for use in uses:
        if use.clusters:
            latest[list(use.clusters)[-1]].append(use)
    for cluster_id, of_cluster in latest.items():
        since = min(use.seen_at or now for use in of_cluster)
        vcpus = next((use.vcpus for use in of_cluster if use.vcpus), None)
        so_far = (
            f"{vcpus} vCPUs, {vcpus * (now - since) / 3600:.2f} vCPU-hours so far"
            if vcpus
            else "vCPUs not known"
        )
        lines.append(
            f"<p>Cluster {escape(cluster_id)}<br><span class=quiet>since {_format_time(since)}: "
            f"{so_far}</span></p>"
        )
    if not latest:
        what = "A cluster of your own" if "://" in manifest else "No cluster has started yet"
        lines.append(f"<p class=quiet>{what}</p>")
    return "".join(lines)


def _render_owner(
    owner: Owner,
    seen_at: float | None,
    queries: Iterable[QueryRecord],
    is_active: bool,
) -> str:
    """Return the HTML of a task or run that uses a cluster, and of its queries."""
    dag = f"../dags/{quote(owner.dag_id, safe='')}"
    run = f"{dag}/runs/{quote(owner.run_id, safe='')}"
    task = f"{run}/tasks/{quote(owner.task_id, safe='')}"
    index = f"[{owner.map_index}]" if owner.map_index >= 0 else ""
    if index:
        task += f"/mapped/{owner.map_index}"
    links = [(dag, owner.dag_id), (run, owner.run_id), (task, owner.task_id + index)]
    line = " · ".join(f"<a href='{escape(link)}'>{escape(text)}</a>" for link, text in links)
    if owner.whole_run:
        line += " for the whole run"
    if seen_at:
        line += f" <span class=quiet>since {_format_time(seen_at)}</span>"
    items = "".join(f"<li>{_render_query(each)}</li>" for each in queries)
    orphan = "" if is_active else f"<p><b>Orphan</b>, will be ended by {ENDED_BY}</p>"
    return (
        f"<div class={'owner' if is_active else 'orphan'}><p>{line}</p>{orphan}"
        f"{f'<ul>{items}</ul>' if items else ''}</div>"
    )


def _render_query(query: QueryRecord) -> str:
    text = f"Query {escape(query.query_id)}" if query.query_id else "Query that is being submitted"
    if urlsplit(query.page).scheme in ("http", "https"):
        text = f"<a href='{escape(query.page)}'>{text}</a>"
    if query.submitted_at:
        text += f" <span class=quiet>since {_format_time(query.submitted_at)}</span>"
    return text + (f"<br>to {escape(query.destination)}" if query.destination else "")


def _format_time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
