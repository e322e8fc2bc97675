"""Exceptions of this package. All derive from `PolarsRemoteError`.

A query that fails raises its own exception, such as `polars.exceptions.ColumnNotFoundError`.
"""

from .compat.versions import AirflowFailException


class PolarsRemoteError(Exception):
    """Base class of this package's exceptions."""


class SettingsError(PolarsRemoteError, ValueError):
    """An environment variable has a value that is not allowed."""


class NotAuthenticatedError(PolarsRemoteError, RuntimeError):
    """The task has no `@authenticate`."""


class LoginRefusedError(PolarsRemoteError, AirflowFailException):
    """The Airflow Connection is missing, incomplete or refused. Not retried."""


class WorkspaceNotFoundError(PolarsRemoteError, AirflowFailException):
    """The account has no such workspace. Not retried."""


class ClusterRefusedError(PolarsRemoteError, AirflowFailException):
    """The cluster, or a call on its context, is not supported. Not retried."""


class ClusterNotStartedError(PolarsRemoteError, RuntimeError):
    """The cluster failed or stopped while it was starting."""


class QueryRefusedError(PolarsRemoteError, AirflowFailException):
    """The query was not submitted, or the task returned one that is not recorded. Not retried."""


class QueryCanceledError(PolarsRemoteError, AirflowFailException):
    """Somebody canceled the query. Not retried."""


class QueryLostError(PolarsRemoteError, RuntimeError):
    """The query has no result: its cluster has stopped, or the result has no location."""


class QueryNotAwaitedError(PolarsRemoteError, RuntimeError):
    """The task ended without waiting for a query that it had submitted."""


class TakenOverError(PolarsRemoteError, RuntimeError):
    """A later try of the task has adopted its queries."""
