"""`@query_task`: decorator of tasks that return submitted queries.

The task is deferred until its queries have ended. It succeeds if all queries succeed.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar, overload

from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import Asset, Context, get_current_context
from airflow.sdk.bases.decorator import DecoratedOperator, Task, task_decorator_factory

from .cloud.client import get_cluster_status, get_query_id, is_query, is_result
from .compat.internals import is_trigger_failure
from .compat.versions import TRIGGERS_CAN_CALL_AIRFLOW, from_json, to_json
from .errors import (
    ClusterNotStartedError,
    QueryCanceledError,
    QueryLostError,
    QueryRefusedError,
)
from .links import QueryLink
from .ownership import record
from .ownership.end import find_recorded
from .ownership.record import Owner, Result, Wait
from .ownership.scope import TaskScope, task_scope
from .queries import RESUBMIT_SECONDS, get_recording_client
from .settings import DEFERS
from .waiting import deferral
from .waiting.deferral import check_deadline, defer_until_ended
from .waiting.in_worker import (
    check_all_awaited,
    check_result,
    log_result,
    to_result,
    wait_until_ended,
)

if TYPE_CHECKING:
    from polars_cloud import DirectQuery

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

QUERY = "polars_cloud_query"
"""Key of a dict that stands for a query in a task's return value; its value is the query's name."""


@overload
def query_task(python_callable: Callable[P, R], /) -> Task[P, R]: ...
@overload
def query_task(
    *, multiple_outputs: bool | None = ..., **options: Any
) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def query_task(
    python_callable: Callable[..., Any] | None = None,
    multiple_outputs: bool | None = None,
    **options: Any,
) -> Any:
    """Make a task of a function that returns a submitted query, or a list or dict of queries.

    Replaces `@task` and takes its options. Put `@authenticate` below it. The task waits for the
    queries without holding a worker slot, and succeeds if all queries succeed. It returns the
    `location` of each result, a list of URIs, in place of the query. If a query fails, its
    exception is raised in the task, and the task's other queries are canceled. Each Asset in the
    task's outlets gets an event with `location` and `rows`, in the shape of the return value.

    For the first 3 seconds the worker itself waits. Then the task is deferred, also while its
    cluster starts; when the cluster is running, the function is called again from its beginning.
    Without a triggerer the task waits in its worker: after some minutes, or at once if
    `POLARS_CLOUD_DEFER=0`.

    Examples
    --------
    >>> @query_task(execution_timeout=timedelta(hours=2))
    ... @authenticate
    ... def build_report(day: str) -> Query:
    ...     ...
    ...     with use_cluster(CLUSTER) as ctx:
    ...         return report.remote(ctx).sink_parquet(uri, sink_to_single_file=True)
    """
    return task_decorator_factory(
        python_callable=python_callable,
        multiple_outputs=multiple_outputs,
        decorated_operator_class=QueryTask,
        **options,
    )


class QueryTask(DecoratedOperator, PythonOperator):
    """The operator of a `@query_task`.

    Attributes
    ----------
    defers
        Whether the task is deferred while it waits.
    query_page
        Address of the page of the task's first query; empty before the submission.
    """

    custom_operator_name = "@query_task"
    template_fields = ("templates_dict", "op_args", "op_kwargs")
    template_fields_renderers = {"templates_dict": "json", "op_args": "py", "op_kwargs": "py"}  # noqa: RUF012
    operator_extra_links = (QueryLink(),)

    def __init__(
        self, *, python_callable: Callable[..., Any], op_args: Any, op_kwargs: Any, **options: Any
    ) -> None:
        function = {
            "python_callable": python_callable,
            "op_args": op_args,
            "op_kwargs": op_kwargs,
        }
        super().__init__(kwargs_to_upstream=function, **function, **options)
        self.defers = DEFERS and TRIGGERS_CAN_CALL_AIRFLOW
        self.query_page = ""

    def resume_execution(
        self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context
    ) -> Any:
        """Resume after a deferral, even if the trigger failed or never ran."""
        if is_trigger_failure(next_method):
            arguments = next_kwargs or {}
            lines = "".join(arguments.get("traceback") or ()).splitlines()
            cause = lines[-1] if lines else str(arguments.get("error"))
            # If the triggerer cannot import the library, the last line is enough.
            if not cause.startswith(ModuleNotFoundError.__name__):
                for line in lines:
                    logger.warning("%s", line)
            logger.warning(
                "No triggerer watches this task (%s): it waits in its worker from now on. Check "
                "that a triggerer runs, and that it can import polars_remote from its PYTHONPATH "
                "or plugins/. To run none, set POLARS_CLOUD_DEFER=0",
                cause,
            )
            self.defers = False
            return self.resume(context)
        return super().resume_execution(next_method, next_kwargs, context)

    def resume(
        self,
        context: Context,
        event: Mapping[str, Any] | None = None,
        waits_for: str | None = None,
        conn_id: str = "polars_cloud",
    ) -> Any:
        """Resume the task with the results in its trigger's event, and return the task's value.

        Raises
        ------
        QueryLostError
            The task's record is gone before its queries have ended.
        ClusterNotStartedError
            The cluster failed or stopped while it was starting.
        """
        event = event or {}
        if waits_for:
            wait: Wait | None = Wait.load(json.loads(waits_for))
        else:  # a failed trigger replaces the arguments of `resume`
            stored = record.get_task(record.task_key(Owner.current(), context["ti"].id))
            wait, conn_id = (stored.waits_for, stored.conn_id) if stored else (None, conn_id)
        if wait is None:
            raise QueryLostError(
                "The record of this task is gone. Its queries may still run, but the task cannot "
                "find them: clear the task to run it again"
            )
        if wait.cluster and "failed" not in event:
            return self.execute(context)
        with task_scope(conn_id) as scope:
            if wait.cluster:
                raise ClusterNotStartedError(
                    f"Cluster {wait.cluster} did not start: {event['failed']}"
                )
            try:
                return self._collect_results(scope, context, wait, event.get("results", {}))
            except _StoppedDuringSubmission as error:
                logger.warning("%s; submitting the query again", error)
        return self.execute(context)

    def _collect_results(
        self, scope: TaskScope, context: Context, wait: Wait, seen: Mapping[str, Any]
    ) -> Any:
        """Collect the trigger's results, wait for the other queries; return the task's value."""
        _restore_outlet_events(context, from_json(wait.outlet_events))
        returned = from_json(wait.returned)
        names = _find_names(returned)
        self.query_page = _find_page(scope, names)
        for name, found in seen.items():
            wait.results[name] = Result.load(found)
            if query := scope.queries.get_record(name):
                rows, location = found["rows"], found["location"]
                log_result(query.query_id or name, rows, location)
        for name, result in wait.results.items():
            if (query := scope.queries.get_record(name)) and query.query_id:
                scope.queries.mark_ended(query.query_id, result)
        if left := [name for name in names if name not in wait.results]:
            check_deadline(scope)
            self._wait(scope, wait, {name: _reconnect(scope, name) for name in left})
        return _finish(context, returned, wait.results)

    def await_returned_queries(self, scope: TaskScope, returned: Any) -> Any:
        """Wait for the queries in the function's return value, and return the task's value."""
        context = get_current_context()
        queries: dict[str, DirectQuery] = {}
        results: dict[str, Result] = {}
        unrecorded: list[DirectQuery] = []

        def replace_by_name(value: Any) -> Any:
            if is_result(value):
                logger.info(
                    "This task waited for its query in the worker. To hold no worker slot, leave "
                    "out await_result(), or write execute(blocking=False)"
                )
                if value.status.name == "FAILED":
                    value.raise_err()
                if value.status.name == "CANCELED":
                    raise QueryCanceledError(
                        f"Somebody canceled this query: {value.finished_task_info.id}"
                    )
                name = scope.queries.find_name(str(value.finished_task_info.id)) or str(id(value))
                results[name] = to_result(value)
            elif not is_query(value):
                return value
            elif found := scope.queries.find_name(get_query_id(value)):
                name = found
                queries[name] = value
            else:
                unrecorded.append(value)
                return value
            return {QUERY: name}

        named = map_queries(replace_by_name, returned)
        if unrecorded:
            _refuse(unrecorded)
        check_all_awaited(scope, excluding=queries)
        if not queries and not results:
            return returned
        scope.queries.cancel_adopted(excluding=queries)
        self.query_page = _find_page(scope, _find_names(named))
        wait = Wait(
            since=time.time(),
            returned=to_json(named),
            outlet_events=to_json(_get_outlet_events(context) if self.defers else []),
            results=results,
        )
        if queries:
            self._wait(scope, wait, queries)
        return _finish(context, named, wait.results)

    def _wait(self, scope: TaskScope, wait: Wait, queries: Mapping[str, DirectQuery]) -> None:
        """Wait for the queries, and add their results to `wait`; defer after a few seconds."""
        clients = {
            name: client for name, each in queries.items() if (client := get_recording_client(each))
        }

        def resubmit(name: str) -> DirectQuery | None:
            return clients[name].submit_again(name) if name in clients else None

        seconds = {"seconds": deferral.IN_WORKER_SECONDS} if self.defers else {}
        found = wait_until_ended(
            scope,
            # Use this worker's open connections, where there are any.
            {**queries, **scope.queries.get_connected(queries)},
            resubmit=resubmit,
            **seconds,
        )
        queries = {**queries, **scope.queries.get_connected(queries)}  # some were submitted again
        for name, result in found.items():
            check_result(scope, name, queries[name], result)
            if result.status.name == "FAILED":
                result.raise_err()
            wait.results[name] = to_result(result)
        if left := [name for name in queries if name not in found]:
            defer_until_ended(scope, left, wait)


class _StoppedDuringSubmission(Exception):
    """The cluster was stopped during the submission; the task submits the query again."""


def _refuse(queries: Sequence[DirectQuery]) -> NoReturn:
    """Raise for queries that are not recorded. Cancels those submitted without `use_cluster`."""
    ids = ", ".join(map(get_query_id, queries))
    if all(map(get_recording_client, queries)):
        raise QueryRefusedError(
            f"The task returned a query that was detached or that another task has submitted: "
            f"{ids}. Return the query's id instead"
        )
    for query in queries:
        query.cancel()
    raise QueryRefusedError(
        f"The task returned a query that was not submitted on a context of use_cluster. The query "
        f"was canceled: {ids}. Submit it on the context that use_cluster yields"
    )


def _reconnect(scope: TaskScope, name: str) -> DirectQuery:
    query = scope.queries.get_record(name)
    if query is None:
        raise QueryLostError(
            f"The record of the query for {name} is gone. The query may still run, but the task "
            "cannot find it: clear the task to run it again"
        )
    if found := find_recorded(scope.session, name, query):
        return found
    session = scope.session
    status, reason = session.call(get_cluster_status, query.cluster_id, session.find_workspace())
    error = QueryLostError(
        f"Cluster {query.cluster_id} stopped ({reason or 'no reason given'}) before query "
        f"{query.query_id} had ended"
    )
    age = time.time() - (query.submitted_at or 0.0)
    if status == "STOPPED" and not reason and age < RESUBMIT_SECONDS:
        raise _StoppedDuringSubmission(error)
    raise error


def _finish(context: Context, named: Any, results: Mapping[str, Result]) -> Any:
    """Return the value with locations in place of queries; add results to the outlet events."""

    def get_part(part: str, value: Any) -> Any:
        return getattr(results[value[QUERY]], part) if _is_name(value) else value

    location, rows = (
        map_queries(functools.partial(get_part, part), named) for part in ("location", "rows")
    )
    events = context["outlet_events"]
    for outlet in context["outlets"]:
        if isinstance(outlet, Asset):
            extra = events[outlet].extra
            events[outlet].extra = {"location": location, "rows": rows, **extra}
    return location


def map_queries(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply the function to each item of nested lists and dicts, or to the value itself."""
    if isinstance(value, Mapping) and not _is_name(value):
        return {key: map_queries(function, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        mapped = [map_queries(function, each) for each in value]
        return tuple(mapped) if isinstance(value, tuple) else mapped
    return function(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {QUERY}


def _find_names(returned: Any) -> Iterable[str]:
    """Return the names of the queries in a task's return value."""
    names: dict[str, None] = {}

    def add(value: Any) -> None:
        if _is_name(value):
            names[value[QUERY]] = None

    map_queries(add, returned)
    return names


def _find_page(scope: TaskScope, names: Iterable[str]) -> str:
    """Return the page of the first of the queries with these names."""
    queries = (scope.queries.get_record(name) for name in names)
    return next((query.page for query in queries if query), "")


def _get_outlet_events(context: Context) -> list[dict[str, Any]]:
    """Return the outlet events that the function has set, to save them: a deferral loses them."""
    events: Any = context["outlet_events"]
    return [
        {
            "outlet": outlet,
            "extra": events[outlet].extra,
            # Before Airflow 3.3, events have no partitions.
            "partitions": sorted(getattr(events[outlet], "partition_keys", ())),
            "added": [
                (Asset(each.dest_asset_key.name, each.dest_asset_key.uri), each.extra)
                for each in events[outlet].asset_alias_events
            ],
        }
        for outlet in events
    ]


def _restore_outlet_events(context: Context, saved: list[dict[str, Any]]) -> None:
    for each in saved:
        event: Any = context["outlet_events"][each["outlet"]]
        event.extra = each["extra"]
        if each["partitions"]:
            event.add_partitions(each["partitions"])
        for asset, extra in each["added"]:
            event.add(asset, extra)
