"""Log a task in to Polars Cloud with an Airflow Connection.

    @task
    @authenticate
    def run() -> list[str]: ...

The Connection is `polars_cloud`, or the one named by `@authenticate(conn_id="...")`: type HTTP,
login = client ID and password = client secret of a service account. When the task ends, its
queries are canceled unless they have ended or the task has detached them.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, get_type_hints, overload

from polars_remote.ownership.scope import has_open_scope, task_scope

P = ParamSpec("P")
R = TypeVar("R")


@overload
def authenticate(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def authenticate(*, conn_id: str = ...) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def authenticate(
    function: Callable[..., Any] | None = None, /, *, conn_id: str = "polars_cloud"
) -> Callable[..., Any]:
    """Log in to Polars Cloud before each run of `function`. Put the decorator below `@task`.

    `function` keeps its signature and annotations, and may be `async`. Decorated functions of one
    task that call each other share login, queries and clusters.

    Parameters
    ----------
    function
        The task's function.
    conn_id
        Id of the Airflow Connection.

    Raises
    ------
    TypeError
        While the DAG file is parsed: `function` is not a function, or is a generator function.
    LoginRefusedError
        At run time, not retried: the Connection is missing, incomplete or refused, or the task is
        logged in with another Connection.
    ConnectionError
        At run time, retried: Polars Cloud cannot be reached.
    ValueError
        At run time, retried: Polars Cloud gave an unexpected answer, which the message quotes.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if not inspect.isfunction(function):
            raise TypeError(
                "@authenticate must decorate a function. Put it below @task; to use another "
                'Connection, write @authenticate(conn_id="...")'
            )

        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"@authenticate decorates {function.__name__}, which is a generator: none of its "
                "code would run in the task. Return a list instead"
            )

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                if has_open_scope(conn_id):
                    return await function(*args, **kwargs)
                with task_scope(conn_id) as scope:
                    await asyncio.to_thread(scope.begin)
                    returned = await function(*args, **kwargs)
                    return await asyncio.to_thread(scope.await_returned_queries, returned)

        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if has_open_scope(conn_id):
                    return function(*args, **kwargs)
                with task_scope(conn_id) as scope:
                    scope.begin()
                    return scope.await_returned_queries(function(*args, **kwargs))

        # TaskFlow would resolve a postponed return annotation in the wrapper's module, not in the
        # DAG file. Resolve it here.
        if "return" in function.__annotations__:
            returns = SimpleNamespace(__annotations__={"return": wrapper.__annotations__["return"]})
            with suppress(NameError, TypeError):  # a name imported under TYPE_CHECKING
                resolved = get_type_hints(returns, inspect.unwrap(function).__globals__)
                wrapper.__annotations__ = wrapper.__annotations__ | resolved
        return wrapper

    return decorate if function is None else decorate(function)
