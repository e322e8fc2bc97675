"""Logins of people: a code in the terminal, confirmed in a browser (RFC 8628)."""

import secrets
from datetime import datetime, timedelta

import msgspec

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.errors import NotFound
from polars_cloud_emulator.protocol.access_tokens import PersonTokens

LIFETIME = timedelta(minutes=2)
MAX_LOGINS = 100
"""Anybody on this machine may begin one. The oldest is forgotten."""
POLL_SECONDS = 1
"""Interval at which the client asks whether its code is confirmed."""
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
"""No vowels: a code spells no word."""


class DeviceLogin(msgspec.Struct):
    """One login. Whoever knows ``device_code`` gets its tokens; ``user_code`` is for reading."""

    device_code: str
    user_code: str
    expires_at: datetime
    tokens: PersonTokens | None = None
    """Of the account with whose secret it was confirmed."""


class DeviceLogins:
    """The logins that were begun and are neither collected nor expired."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._logins: list[DeviceLogin] = []

    def begin(self) -> DeviceLogin:
        code = "".join(secrets.choice(LETTERS) for _ in range(8))
        login = DeviceLogin(
            device_code=secrets.token_urlsafe(32),
            user_code=f"{code[:4]}-{code[4:]}",
            expires_at=self._clock.now_for_logins() + LIFETIME,
        )
        self._logins = [*self._current(), login][-MAX_LOGINS:]
        return login

    def find(self, user_code: str) -> DeviceLogin:
        """Return the login with this code.

        Raises
        ------
        NotFound
            There is none, or it has expired or is collected.
        """
        for login in self._current():
            if login.user_code == user_code:
                return login
        raise NotFound(f"login code {user_code} is unknown or has expired; run `pc login` again")

    def collect(self, device_code: str) -> PersonTokens | None:
        """Return the tokens of a login that is confirmed, and forget the login.

        Raises
        ------
        NotFound
            There is none, or it has expired or is collected.
        """
        for login in self._current():
            if secrets.compare_digest(login.device_code.encode(), device_code.encode()):
                if login.tokens is not None:
                    self._logins.remove(login)
                return login.tokens
        raise NotFound("this device code is unknown or has expired")

    def clear(self) -> None:
        self._logins.clear()

    def _current(self) -> list[DeviceLogin]:
        now = self._clock.now_for_logins()
        return [login for login in self._logins if login.expires_at > now]
