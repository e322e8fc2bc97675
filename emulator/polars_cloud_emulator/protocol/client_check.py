"""Check of a request's client version and access token."""

import os
from collections.abc import Callable

import polars as pl
from starlette.datastructures import Headers

from polars_cloud_emulator.model.errors import WrongState

CLIENT_VERSION = "0.12"
SWITCH = "EMULATOR_ANY_CLIENT"
"""Environment variable that admits other client versions, whose requests may fail to decode."""


class ClientCheck:
    """Refuses clients of another version, with an error that the client shows to its user.

    Parameters
    ----------
    check_authorization
        Raises ``Unauthenticated`` unless the ``Authorization`` header is valid.
    """

    def __init__(self, check_authorization: Callable[[str | None], object]) -> None:
        self._check_authorization = check_authorization

    def __call__(self, headers: Headers) -> None:
        """Check the headers of a request.

        Raises
        ------
        WrongState
            The client is not ``polars_cloud``, or its version or that of ``polars`` is not
            supported.
        Unauthenticated
            The access token is missing or not valid.
        """
        client = headers.get("x-client-version", "none")
        if not f"{client}.".startswith(f"{CLIENT_VERSION}.") and os.environ.get(SWITCH) != "1":
            raise WrongState(
                f"this emulator supports polars_cloud {CLIENT_VERSION}.x, not "
                f"{headers.get('user-agent', 'an unknown client')}; "
                f"install polars-cloud=={CLIENT_VERSION}.*, or set {SWITCH}=1 in the emulator's "
                "environment to try anyway"
            )
        if headers.get("x-polars-version") != pl.__version__:
            raise WrongState(
                f"this emulator runs polars {pl.__version__}, the client has "
                f"{headers.get('x-polars-version', 'none')}; install polars=={pl.__version__}"
            )
        self._check_authorization(headers.get("authorization"))
