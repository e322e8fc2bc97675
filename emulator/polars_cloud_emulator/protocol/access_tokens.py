"""Service accounts and their short-lived access tokens."""

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
"""Paths of the identity provider behind the real service."""
CLIENT_ID = "polars-cloud-emulator"
ACCOUNT_ID = UUID("5e41ce00-acc0-4000-8000-000000000001")
ACCESS, REFRESH = "access", "refresh"
REFRESH_LIFETIME = timedelta(days=1)
"""Lifetime of a refresh token: a person stays logged in this long."""


class PersonTokens(NamedTuple):
    """Tokens of a person who is logged in as a service account."""

    access: str
    refresh: str


class AccessTokens:
    """Issues access tokens for client secrets, and validates them.

    Parameters
    ----------
    client_secret
        Secret of the first service account, ``CLIENT_ID``. It also signs all tokens, so tokens stay
        valid across a restart, and tokens of another issuer are refused.
    lifetime
        Lifetime of an access token. The client requests a new one in the last 10 s.
    """

    def __init__(self, clock: Clock, client_secret: str, lifetime: timedelta) -> None:
        self._clock = clock
        self._signing_key = client_secret
        self._secrets = {CLIENT_ID: client_secret}
        self._lifetime = lifetime
        self._generation = 0
        self.revoked = False
        """True if the client secrets are refused, too."""

    def add_account(self, name: str) -> tuple[str, str]:
        """Add a service account, and return its client id and secret.

        The account exists until ``forget_added_accounts``.

        Raises
        ------
        Conflict
            An account with this name exists.
        """
        client_id = f"{CLIENT_ID}-{name}"
        if client_id in self._secrets:
            raise Conflict(f"service account '{client_id}' exists; reset the emulator to remove it")
        self._secrets[client_id] = secrets.token_urlsafe(32)
        return client_id, self._secrets[client_id]

    def forget_added_accounts(self) -> None:
        """Remove all service accounts but the first, and refuse their tokens."""
        self._secrets = {CLIENT_ID: self._signing_key}

    def issue(self, client_id: str, client_secret: str) -> str:
        """Return an access token for a service account.

        Raises
        ------
        Unauthenticated
            The client id or secret is wrong, or the secrets are revoked.
        """
        self._check_secret(client_id, client_secret)
        return self._token(ACCESS, client_id, self._lifetime)

    def issue_to_person(self, client_id: str, client_secret: str) -> PersonTokens:
        """Return tokens for a person who knows the secret of a service account.

        Raises
        ------
        Unauthenticated
            The client id or secret is wrong, or the secrets are revoked.
        """
        self._check_secret(client_id, client_secret)
        return self._person_tokens(client_id)

    def renew(self, refresh_token: str) -> PersonTokens:
        """Return new tokens for a refresh token.

        Raises
        ------
        Unauthenticated
            The token was not issued by this emulator, is not a refresh token, or has expired; its
            account was removed, or the secrets are revoked.
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
        # The client decodes the payload as standard Base64 without padding. JWT uses URL-safe
        # Base64, but the two characters in which they differ never occur for ASCII text.
        claims = {
            "typ": kind,
            "sub": client_id,
            # Read by the client, which compares it with the system's clock.
            "exp": int((datetime.now(UTC) + lifetime).timestamp()),
            # Read by the emulator, which compares it with its own clock.
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
                # PyJWT would compare it with the system's clock, not with the emulator's.
                options={"verify_exp": False},
            )
        except jwt.InvalidTokenError:
            claims = {}
        if claims.get("typ") != kind:
            raise Unauthenticated(f"this {kind} token was not issued by this emulator")
        return claims

    def _account_of(self, claims: dict[str, Any]) -> str:
        client_id: str = claims["sub"]
        # An account that was removed and added again has the same name, but another secret.
        if _digest(self._secrets.get(client_id, "")) != claims["secret"]:
            raise Unauthenticated(f"service account '{client_id}' was removed")
        return client_id

    def check_basic(self, authorization: str | None) -> None:
        """Check an HTTP Basic header with a client id and secret, also while secrets are revoked.

        Raises
        ------
        Unauthenticated
            The header is missing or malformed, or the client id or secret is wrong.
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
        # No rate limit: a secret has 256 random bits, too many to guess.
        expected = self._secrets.get(client_id)
        if expected is None or not secrets.compare_digest(
            client_secret.encode(), expected.encode()
        ):
            raise Unauthenticated("unknown client id or wrong client secret")

    def expire(self) -> None:
        """Expire all tokens issued so far."""
        self._generation += 1

    def check(self, authorization: str | None) -> str:
        """Check an ``Authorization: Bearer <token>`` header, and return its client id.

        Raises
        ------
        Unauthenticated
            The token is missing, has expired, or is another issuer's; or its account was removed.
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
    """Authorization header of an on-premises cluster, which issues no tokens.

    Parameters
    ----------
    secret
        Part of the header after ``Bearer``.
    """

    def __init__(self, secret: str) -> None:
        self.authorization = f"Bearer {secret}"

    def check(self, authorization: str | None) -> None:
        """Check the header.

        Raises
        ------
        Unauthenticated
            The header is missing or another one.
        """
        if not secrets.compare_digest((authorization or "").encode(), self.authorization.encode()):
            raise Unauthenticated("send the authorization header that the cluster was set up with")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
