"""The service accounts, and the short-lived access tokens that they are given."""

import base64
import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import jwt

from polars_cloud_emulator.clock import Clock
from polars_cloud_emulator.model.errors import Conflict, Unauthenticated

TOKEN_PATH = "/realms/Polars/protocol/openid-connect/token"
DEVICE_PATH = "/realms/Polars/protocol/openid-connect/auth/device"
"""Both of the identity provider behind the real service."""
CLIENT_ID = "polars-cloud-emulator"
ACCOUNT_ID = UUID("5e41ce00-acc0-4000-8000-000000000001")
ACCESS, REFRESH = "access", "refresh"
REFRESH_LIFETIME = timedelta(days=1)
"""How long a person stays logged in."""


class PersonTokens(NamedTuple):
    """The tokens of a person, who acts as a service account."""

    access: str
    refresh: str


class AccessTokens:
    """Gives tokens for the right secret, and recognizes them.

    Parameters
    ----------
    client_secret
        The secret of the first service account, ``CLIENT_ID``. It also signs all tokens, so that
        those of an emulator before a restart stay good and those of anyone else are refused.
    lifetime
        How long a token is good. The client fetches a new one when less than 10 s are left.
    """

    def __init__(self, clock: Clock, client_secret: str, lifetime: timedelta) -> None:
        self._clock = clock
        self._signing_key = client_secret
        self._secrets = {CLIENT_ID: client_secret}
        self._lifetime = lifetime
        self._generation = 0
        self.revoked = False
        """Whether the secrets are refused, too."""

    def add_account(self, name: str) -> tuple[str, str]:
        """Id and secret of a new service account, which lasts until the accounts are forgotten.

        Raises
        ------
        Conflict
            The name is taken.
        """
        client_id = f"{CLIENT_ID}-{name}"
        if client_id in self._secrets:
            raise Conflict(f"service account '{client_id}' exists; reset the emulator to forget it")
        self._secrets[client_id] = secrets.token_urlsafe(32)
        return client_id, self._secrets[client_id]

    def forget_added_accounts(self) -> None:
        """Leave the first service account alone; the tokens of the others are refused, too."""
        self._secrets = {CLIENT_ID: self._signing_key}

    def issue(self, client_id: str, client_secret: str) -> str:
        """A token for a service account.

        Raises
        ------
        Unauthenticated
            The id or the secret is wrong, or the secret is revoked.
        """
        self._check_secret(client_id, client_secret)
        return self._token(ACCESS, client_id, self._lifetime)

    def issue_to_person(self, client_id: str, client_secret: str) -> PersonTokens:
        """Return tokens for a person who knows the secret of a service account.

        Raises
        ------
        Unauthenticated
            The id or the secret is wrong, or the secret is revoked.
        """
        self._check_secret(client_id, client_secret)
        return self._person_tokens(client_id)

    def renew(self, refresh_token: str) -> PersonTokens:
        """Return new tokens for the person who has a refresh token.

        Raises
        ------
        Unauthenticated
            The token is no refresh token from here or has expired, its account is forgotten, or
            the secrets are revoked.
        """
        claims = self._claims(REFRESH, refresh_token)
        if claims["good_until"] <= self._clock.now_for_logins().timestamp():
            raise Unauthenticated("the refresh token has expired")
        return self._person_tokens(self._account_of(claims))

    def _person_tokens(self, client_id: str) -> PersonTokens:
        return PersonTokens(
            self._token(ACCESS, client_id, self._lifetime),
            self._token(REFRESH, client_id, REFRESH_LIFETIME),
        )

    def _token(self, kind: str, client_id: str, lifetime: timedelta) -> str:
        if self.revoked:
            raise Unauthenticated("the client secret is revoked")
        # The client decodes the payload with the standard alphabet and without padding:
        # ASCII text never needs the two letters in which the alphabets differ.
        claims = {
            "typ": kind,
            "sub": client_id,
            # What the client goes by: the system's time, which is its own.
            "exp": int((datetime.now(UTC) + lifetime).timestamp()),
            # What counts here.
            "good_until": int((self._clock.now_for_logins() + lifetime).timestamp()),
            "generation": self._generation,
            "secret": _digest(self._secrets[client_id]),
        }
        return jwt.encode(claims, self._signing_key)

    def _claims(self, kind: str, token: str) -> dict[str, Any]:
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._signing_key,
                algorithms=["HS256"],
                # By the emulator's clock, not by the system's.
                options={"verify_exp": False},
            )
        except jwt.InvalidTokenError:
            claims = {}
        if claims.get("typ") != kind:
            raise Unauthenticated(f"this {kind} token was not issued here")
        return claims

    def _account_of(self, claims: dict[str, Any]) -> str:
        client_id: str = claims["sub"]
        # An account that was added again under the same name has another secret.
        if _digest(self._secrets.get(client_id, "")) != claims["secret"]:
            raise Unauthenticated(f"service account '{client_id}' is forgotten")
        return client_id

    def check_basic(self, authorization: str | None) -> None:
        """Accept ``Basic <client id and secret>``, also while secrets are revoked.

        Raises
        ------
        Unauthenticated
            There are none, or they are no service account's.
        """
        scheme, _, credentials = (authorization or "").partition(" ")
        if scheme.lower() != "basic":
            raise Unauthenticated("send the client id and secret of a service account (HTTP Basic)")
        try:
            client_id, _, client_secret = base64.b64decode(credentials).decode().partition(":")
        except ValueError:
            raise Unauthenticated("the client id and secret are not in Base64") from None
        self._check_secret(client_id, client_secret)

    def _check_secret(self, client_id: str, client_secret: str) -> None:
        # Guessing is hopeless: each secret is 256 random bits.
        expected = self._secrets.get(client_id)
        if expected is None or not secrets.compare_digest(
            client_secret.encode(), expected.encode()
        ):
            raise Unauthenticated("unknown client id or wrong client secret")

    def expire(self) -> None:
        """From now on only tokens of new logins are good."""
        self._generation += 1

    def check(self, authorization: str | None) -> str:
        """Accept ``Bearer <token>``; the client id of the account that it was issued to.

        Raises
        ------
        Unauthenticated
            There is no token, it is another issuer's, its account is forgotten, or it has expired.
        """
        if authorization is None or not authorization.startswith("Bearer "):
            raise Unauthenticated("no access token")
        claims = self._claims(ACCESS, authorization.removeprefix("Bearer "))
        if (
            claims["good_until"] <= self._clock.now_for_logins().timestamp()
            or claims["generation"] < self._generation
        ):
            raise Unauthenticated("the access token has expired")
        return self._account_of(claims)


class ClusterKey:
    """The header by which a cluster of a company's own knows its users: it hands out no tokens.

    Parameters
    ----------
    secret
        What stands in the header behind ``Bearer``.
    """

    def __init__(self, secret: str) -> None:
        self.authorization = f"Bearer {secret}"

    def check(self, authorization: str | None) -> None:
        """Accept this header alone.

        Raises
        ------
        Unauthenticated
            It is another one, or none.
        """
        if not secrets.compare_digest((authorization or "").encode(), self.authorization.encode()):
            raise Unauthenticated("send the authorization header that the cluster was set up with")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
