"""Device logins: a code shown in the terminal and confirmed in a browser (RFC 8628)."""

import secrets
from datetime import datetime, timedelta

import msgspec

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.errors import NotFound
from polars_cloud_emulator.protocol.access_tokens import PersonTokens

LIFETIME = timedelta(minutes=2)
MAX_LOGINS = 100
"""Maximum of pending logins, which need no credentials. The oldest is dropped."""
POLL_SECONDS = 1
"""Interval at which the client polls for the confirmation."""
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
"""Letters of a user code, without vowels, so that a code spells no word."""


class DeviceLogin(msgspec.Struct):
    """One pending login.

    ``user_code`` is shown to the person. ``device_code`` is secret: it is exchanged for the tokens.
    """

    device_code: str
    user_code: str
    expires_at: datetime
    tokens: PersonTokens | None = None
    """Tokens of the account that confirmed the login; None until then."""


class DeviceLogins:
    """Device logins that have not expired, and whose tokens have not been collected."""

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
        """Return the login with this user code.

        Raises
        ------
        NotFound
            The code is unknown, has expired, or its tokens were collected.
        """
        for login in self._current():
            if login.user_code == user_code:
                return login
        raise NotFound(f"login code {user_code} is unknown or has expired; run `pc login` again")

    def collect(self, device_code: str) -> PersonTokens | None:
        """Return the tokens of a confirmed login, and remove it; None if it is not confirmed yet.

        Raises
        ------
        NotFound
            The code is unknown, has expired, or its tokens were collected.
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
