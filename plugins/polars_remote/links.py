"""Links in Airflow's UI."""

from typing import Any

from airflow.sdk import BaseOperatorLink


class QueryLink(BaseOperatorLink):
    """Link from a task to its query's page on Polars Cloud. The worker stores the address."""

    name = "Polars Cloud query"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return the page of the task's first query."""
        return str(operator.query_page)


class StoredQueryLink(BaseOperatorLink):
    """The same link on tasks with Airflow's own operators, for the API server."""

    name = QueryLink.name

    @property
    def operators(self) -> Any:  # type: ignore[override]
        """Operators whose tasks may have a query. Imported late, to keep task processes fast."""
        from .compat.internals import get_python_operators

        return get_python_operators()

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return the address that the worker has stored; empty if the task has no query."""
        from .compat.internals import read_link

        return read_link(self.name, QueryLink().xcom_key, operator, ti_key)


def link_to_query(task: Any, page: str, *, instead_of: str = "") -> None:
    """Link from the task to the query's page, if the task has no link to an earlier query.

    Parameters
    ----------
    instead_of
        Page of the query that this one replaces.
    """
    if getattr(task, "query_page", "") in ("", instead_of):
        task.query_page = page
    # After the task, the worker stores the addresses of the operator's links.
    if page and not any(isinstance(each, QueryLink) for each in task.operator_extra_links):
        task.operator_extra_links = (*task.operator_extra_links, QueryLink())
