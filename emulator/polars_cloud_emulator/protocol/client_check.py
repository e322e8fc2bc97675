"""Who may call: one version of the client, with a token that was issued here."""

import os
from collections.abc import Callable

import polars as pl
from starlette.datastructures import Headers

from polars_cloud_emulator.model.errors import WrongState

CLIENT_VERSION = "0.12"
SWITCH = "EMULATOR_ANY_CLIENT"
"""Variable that lets other versions of the client try; what they say may not be understood."""


class ClientCheck:
    """Refuses, in words that the user sees, every client whose protocol is not spoken here.

    Parameters
    ----------
    check_authorization
        Raises ``Unauthenticated`` unless this header is good.
    """

    def __init__(self, check_authorization: Callable[[str | None], object]) -> None:
        self._check_authorization = check_authorization

    def __call__(self, headers: Headers) -> None:
        """Accept a call with these headers.

        Raises
        ------
        WrongState
            Another client, or another version of ``polars_cloud`` or ``polars``.
        Unauthenticated
            No good token.
        """
        client = headers.get("x-client-version", "none")
        if not f"{client}.".startswith(f"{CLIENT_VERSION}.") and os.environ.get(SWITCH) != "1":
            raise WrongState(
                f"this emulator speaks to polars_cloud {CLIENT_VERSION}.x, not to "
                f"{headers.get('user-agent', 'an unknown client')}; "
                f"install polars-cloud=={CLIENT_VERSION}.*, or try all the same with "
                f"{SWITCH}=1 in the emulator's environment"
            )
        if headers.get("x-polars-version") != pl.__version__:
            raise WrongState(
                f"this emulator runs polars {pl.__version__}, the client has "
                f"{headers.get('x-polars-version', 'none')}; install polars=={pl.__version__}"
            )
        self._check_authorization(headers.get("authorization"))
