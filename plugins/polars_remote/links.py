"""Links in Airflow's UI."""

from typing import Any

from airflow.sdk import BaseOperatorLink


class QueryLink(BaseOperatorLink):
    """Link from a task to its query's page on Polars Cloud."""

    name = "Polars Cloud query"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return the page of the task's first query."""
        return str(operator.page)
