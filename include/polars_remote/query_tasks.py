"""`@query_task`: a task that returns a submitted query succeeds when the query does.

It holds no worker slot until then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import Asset, BaseOperatorLink, Context
from airflow.sdk.bases.decorator import DecoratedOperator, Task, task_decorator_factory

from . import deferral, ledger
from .airflow_internals import has_lost_its_trigger
from .airflow_versions import TELLS_TRIGGERS, from_json, to_json
from .client_internals import get_query_id, look_at_cluster
from .deferral import check_deadline, defer_until_ended
from .ledger import Owner, Value
from .login import call_polars_cloud, log_in_when_called
from .recorded_queries import find_query
from .settings import DEFERS, WORKSPACE
from .task_scope import TaskScope, current_scope, task_scope
from .waiting import get_result, log_result, wait_until_ended

if TYPE_CHECKING:
    from polars_cloud import DirectQuery

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

QUERY = "polars_cloud_query"
"""Key of what stands for a query, by its destination, in what a task returns."""


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
    """Make a task of a function that returns a submitted query, or a list or dict of them.

    In place of `@task`, and with its options; `@authenticate` stays below it. The task succeeds
    when its queries have succeeded, and holds no worker slot until then. In the place of each query
    it returns the `location` of its result, a list of URIs. A query that fails raises its own
    exception in the task, and the task's other queries are canceled. Each Asset among the task's
    outlets gets an event with `location` and `rows`, in the shape of what the task returns.

    A query that ends within some seconds is waited for in the worker. While a cluster starts, the
    task holds no slot either; when it is running, the function is called again from its beginning.
    Without a triggerer the task waits in its worker: at once with `POLARS_CLOUD_DEFER=0`, and after
    some minutes otherwise.

    Examples
    --------
    >>> @query_task(execution_timeout=timedelta(hours=2))
    ... @authenticate
    ... def build_report(day: str) -> Query:
    ...     ...
    ...     with use_cluster(CLUSTER) as ctx:
    ...         return submit(report.remote(ctx).sink_parquet, uri)
    """
    return task_decorator_factory(
        python_callable=python_callable,
        multiple_outputs=multiple_outputs,
        decorated_operator_class=QueryTask,
        **options,
    )


class QueryLink(BaseOperatorLink):
    """Leads from a task in Airflow's UI to its query's page on Polars Cloud."""

    name = "Polars Cloud query"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return the page of the task's query, the first one's if there are several."""
        return str(operator.page)


class QueryTask(DecoratedOperator, PythonOperator):
    """The operator of a `@query_task`.

    Attributes
    ----------
    defers
        Whether it gives its slot back while it waits.
    page
        The address of its query's page.
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
        self.defers = DEFERS and TELLS_TRIGGERS
        self.page = ""

    def resume_execution(
        self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context
    ) -> Any:
        """Go on after a deferral, also where its trigger has failed or was never run."""
        if has_lost_its_trigger(next_method):
            for line in (next_kwargs or {}).get("traceback") or ():
                logger.warning("%s", line.rstrip())
            logger.warning(
                "No triggerer looks after this task (%s): it waits in its worker from now on. Is a "
                "triggerer running, with this folder on its PYTHONPATH or in plugins/? If there is "
                "to be none, set POLARS_CLOUD_DEFER=0",
                (next_kwargs or {}).get("error"),
            )
            self.defers = False
            return self.resume(context)
        return super().resume_execution(next_method, next_kwargs, context)

    def resume(self, context: Context, event: Mapping[str, Any] | None = None) -> Any:
        """Go on with what the task waits for, and with what its trigger has seen of it.

        Raises
        ------
        RuntimeError
            There is no record any more of what the task has started: somebody has ended it.
        """
        event = event or {}
        entry = ledger.get(ledger.task_key(Owner.current(), context["ti"].id))
        if entry is None:
            raise RuntimeError(
                "What this task was waiting for has been ended, and is not on record any more"
            )
        _, value = entry
        waits_for = value["waits_for"]
        if cluster_id := waits_for.get("cluster"):
            if reason := event.get("failed"):
                with task_scope(value["conn_id"]) as scope:
                    log_in_when_called(scope.conn_id)
                    raise RuntimeError(f"Cluster {cluster_id} did not start: {reason}")
            return self.execute(context)
        with task_scope(value["conn_id"]) as scope:
            log_in_when_called(scope.conn_id)
            _restore_outlet_events(context, from_json(waits_for["outlet_events"]))
            returned = from_json(waits_for["returned"])
            destinations = _get_queries(returned)
            self.page = scope.queries[destinations[0]]["page"]
            results = waits_for["results"]
            for destination, result in event.get("results", {}).items():
                results[destination] = result
                query_id = scope.queries[destination]["query_id"]
                log_result(query_id, result["rows"], result["location"])
            for destination in results:
                scope.set_awaited(scope.queries[destination]["query_id"])
            left = [each for each in destinations if each not in results]
            if left:
                check_deadline(scope)
                self._wait(scope, waits_for, {each: _find(scope, each) for each in left})
            return _finish(context, returned, results)

    def settle(self, returned: Any, context: Context) -> Any:
        """Wait for the queries in what the task's function has returned."""
        from polars_cloud import DirectQuery

        scope = current_scope()
        queries: dict[str, DirectQuery] = {}

        def name(value: Any) -> Any:
            if not isinstance(value, DirectQuery):
                return value
            destination = scope.find_destination(get_query_id(value))
            if destination is None:
                value.cancel()
                # Left running for this query when their blocks ended: the task's end stops them.
                for manifest in scope.clusters:
                    scope.use(manifest, scope.owner)
                raise TypeError(
                    f"The task returned query {get_query_id(value)}, which was not submitted with "
                    "submit and has been canceled: write return submit(remote.sink_parquet, uri)"
                )
            queries[destination] = value
            return {QUERY: destination}

        named = _replace(returned, name)
        scope.check_that_all_were_awaited(besides=queries)
        if not queries:
            return returned
        self.page = scope.queries[next(iter(queries))]["page"]
        waits_for = {
            "returned": to_json(named),
            "since": time.time(),
            "outlet_events": to_json(_get_outlet_events(context) if self.defers else []),
            "results": {},
        }
        self._wait(scope, waits_for, queries)
        return _finish(context, named, waits_for["results"])

    def _wait(self, scope: TaskScope, waits_for: Value, queries: Mapping[str, DirectQuery]) -> None:
        """Add the results of the queries to those in `waits_for`, after a deferral if need be."""
        seconds = {"seconds": deferral.IN_WORKER_SECONDS} if self.defers else {}
        left = wait_until_ended(list(queries.values()), **seconds)
        for destination, query in queries.items():
            if query not in left:
                result = get_result(query)
                waits_for["results"][destination] = {
                    "location": result.location,
                    "rows": result.n_rows_total,
                }
        if left:
            logger.info(
                "The task waits without a worker slot, for %s",
                ", ".join(f"query {get_query_id(query)}" for query in left),
            )
            destinations = [each for each, query in queries.items() if query in left]
            defer_until_ended(scope, destinations, waits_for)


def settle(returned: Any, context: Context) -> Any:
    """What a task returns: in a `@query_task`, the locations of results in place of its queries."""
    task = current_scope().task
    return task.settle(returned, context) if isinstance(task, QueryTask) else returned


def _find(scope: TaskScope, destination: str) -> DirectQuery:
    record = scope.queries[destination]
    query = find_query(destination, record)
    if query is None:
        cluster_id = record["cluster_id"]
        _, reason = call_polars_cloud(look_at_cluster, cluster_id, WORKSPACE)
        raise RuntimeError(
            f"Cluster {cluster_id} has stopped ({reason or 'no reason given'}) before query "
            f"{record['query_id']} ended"
        )
    return query


def _finish(context: Context, named: Any, results: Mapping[str, Any]) -> Any:
    """Put results where the task has returned queries, and into its outlets' events."""

    def put(part: str) -> Any:
        def of(value: Any) -> Any:
            return results[value[QUERY]][part] if _is_query(value) else value

        return _replace(named, of)

    events = context["outlet_events"]
    for outlet in context["outlets"]:
        if isinstance(outlet, Asset):
            extra = events[outlet].extra
            events[outlet].extra = {"location": put("location"), "rows": put("rows"), **extra}
    return put("location")


def _replace(value: Any, by: Callable[[Any], Any]) -> Any:
    """Replace what is in lists and dicts, or the value itself if it is neither."""
    if isinstance(value, Mapping) and not _is_query(value):
        return {key: _replace(each, by) for key, each in value.items()}
    if isinstance(value, list | tuple):
        replaced = [_replace(each, by) for each in value]
        return tuple(replaced) if isinstance(value, tuple) else replaced
    return by(value)


def _is_query(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {QUERY}


def _get_queries(returned: Any) -> list[str]:
    """Destinations of the queries in what a task has returned."""
    found: list[str] = []

    def note(value: Any) -> None:
        if _is_query(value) and value[QUERY] not in found:
            found.append(value[QUERY])

    _replace(returned, note)
    return found


def _get_outlet_events(context: Context) -> list[dict[str, Any]]:
    """What the function has told of its outlets: a deferral would lose it."""
    events: Any = context["outlet_events"]
    return [
        {
            "outlet": outlet,
            "extra": events[outlet].extra,
            "partitions": sorted(events[outlet].partition_keys),
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
