"""The date that a run stands for."""

from datetime import date

from airflow.sdk import get_current_context


def get_run_date() -> date:
    """Return the run's own date (UTC): of its logical date or, if it has none, of its start.

    A run that was triggered by hand may have no logical date; then `run_after` stands in, which
    every run has and which clearing it does not change.
    """
    context = get_current_context()
    moment = context.get("logical_date") or context["dag_run"].run_after
    return moment.date()
