"""Check of an S3 request's signature against the one that botocore computes.

Signature Version 4, in the ``Authorization`` header or in the query string of a presigned URL
(https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html).
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http.client import HTTPMessage
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from botocore.auth import SIGV4_TIMESTAMP, UNSIGNED_PAYLOAD, S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from werkzeug.wrappers import Request

from polars_cloud_emulator.storage.s3_errors import S3Error

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

ALGORITHM = "AWS4-HMAC-SHA256"
SERVICE = "s3"
MAX_SKEW = timedelta(minutes=15)
LONGEST_LIFE = timedelta(days=7)
"""Maximum lifetime of a presigned URL."""
UNSIGNED_CHUNKS = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
SIGNED_CHUNKS = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
SIGNED_CHUNKS_AND_TRAILER = f"{SIGNED_CHUNKS}-TRAILER"
STREAMED = {UNSIGNED_CHUNKS, SIGNED_CHUNKS, SIGNED_CHUNKS_AND_TRAILER}
"""Values of ``x-amz-content-sha256`` for a body in ``aws-chunked`` encoding."""
NO_HASH = {UNSIGNED_PAYLOAD, *STREAMED}
"""Values of ``x-amz-content-sha256`` that are not a hash."""


class _Computed(S3SigV4Auth):  # type: ignore[misc]
    """botocore's signature of a request that has only its signed headers."""

    def headers_to_sign(self, request: AWSRequest) -> HTTPMessage:
        headers: HTTPMessage = request.headers
        return headers

    def payload(self, request: AWSRequest) -> str:
        payload: str = request.context["payload"]
        return payload


class ChunkSignatures:
    """Signatures of a body's chunks, each computed from the previous one.

    https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html
    """

    def __init__(self, computed: _Computed, request: AWSRequest, seed: str) -> None:
        self._computed = computed
        self._request = request
        self._previous = seed

    def check_chunk(self, chunk: bytes, signature: str) -> None:
        """Check the next chunk.

        Raises
        ------
        S3Error
            The signature does not match.
        """
        self._check("PAYLOAD", f"{_hash(b'')}\n{_hash(chunk)}", signature)

    def check_trailer(self, trailer: bytes, signature: str) -> None:
        """Check the trailing headers, each terminated by a line feed.

        Raises
        ------
        S3Error
            The signature does not match.
        """
        self._check("TRAILER", _hash(trailer), signature)

    def _check(self, kind: str, content: str, signature: str) -> None:
        date = self._request.context["timestamp"]
        scope = self._computed.credential_scope(self._request)
        text = f"{ALGORITHM}-{kind}\n{date}\n{scope}\n{self._previous}\n{content}"
        self._previous = self._computed.signature(text, self._request)
        _compare(self._previous, signature)


class Signed(NamedTuple):
    """The verified claims of a request's signature."""

    region: str
    payload: str
    """SHA-256 of the body, or one of ``NO_HASH``."""
    chunks: ChunkSignatures


class SignatureCheck:
    """Accepts requests that are signed with one pair of keys."""

    def __init__(self, access_key: str, secret_key: str) -> None:
        self._credentials = Credentials(access_key, secret_key)

    def __call__(self, request: Request, now: datetime) -> Signed:
        """Check a request before its body is read.

        Raises
        ------
        S3Error
            The signature is missing, malformed, expired or wrong.
        """
        query = parse_qsl(request.query_string.decode(), keep_blank_values=True)
        claim = _claim_of(request, dict(query))
        if claim.service != SERVICE:
            raise S3Error("NoSuchService", f"The emulator serves only S3, not {claim.service}.")
        if claim.access_key != self._credentials.access_key:
            raise S3Error(
                "InvalidAccessKeyId",
                "The AWS Access Key Id you provided does not exist in our records. "
                "Take both keys from the emulator's env file.",
            )
        claim.check_date(now)
        _check_token(request, dict(query))
        _check_all_are_signed(request, claim.headers)
        computed = _Computed(self._credentials, SERVICE, claim.region)
        signed = AWSRequest(
            request.method,
            # The raw path, normalized to the URL encoding that signatures use.
            "http://host" + quote(unquote_to_bytes(raw_path(request.environ)), safe="/~"),
            {name: request.headers.get(name, "") for name in claim.headers},
            params=[(name, value) for name, value in query if name != "X-Amz-Signature"],
        )
        signed.context |= {"timestamp": claim.date, "payload": claim.payload}
        text = computed.string_to_sign(signed, computed.canonical_request(signed))
        _compare(computed.signature(text, signed), claim.signature)
        chunks = ChunkSignatures(computed, signed, claim.signature)
        return Signed(claim.region, claim.payload, chunks)


def raw_path(environ: "WSGIEnvironment") -> str:
    """Return the path of a request without decoding it."""
    return str(environ["RAW_URI"].partition("?")[0])


class _Claim(NamedTuple):
    """The unverified claims of a request's signature."""

    malformed: str
    """Error code if a claim is malformed."""
    access_key: str
    day: str
    region: str
    service: str
    date: str
    headers: list[str]
    signature: str
    payload: str
    expires: str | None
    """Lifetime of a presigned URL, in seconds."""

    def check_date(self, now: datetime) -> None:
        try:
            signed_at = datetime.strptime(self.date, SIGV4_TIMESTAMP).replace(tzinfo=UTC)
        except ValueError:
            raise S3Error("AccessDenied", "X-Amz-Date is missing or malformed.") from None
        if self.day != self.date[:8]:
            raise S3Error(self.malformed, f"X-Amz-Date is not on the credential's day {self.day}.")
        if self.expires is None:
            if abs(now - signed_at) > MAX_SKEW:
                raise S3Error(
                    "RequestTimeTooSkewed",
                    "The difference between the request time and the current time is too large.",
                )
        else:
            seconds = int(self.expires) if re.fullmatch("[0-9]{1,6}", self.expires) else 0
            if not timedelta(0) < timedelta(seconds=seconds) <= LONGEST_LIFE:
                raise S3Error(self.malformed, "X-Amz-Expires must be from 1 to 604800 seconds.")
            if signed_at > now + MAX_SKEW:
                raise S3Error("AccessDenied", "Request is not valid yet.")
            if signed_at + timedelta(seconds=seconds) < now:
                raise S3Error("AccessDenied", "Request has expired.")


def _claim_of(request: Request, query: Mapping[str, str]) -> _Claim:
    authorization = request.headers.get("authorization")
    fields: dict[str, str]
    if authorization is not None and "X-Amz-Algorithm" in query:
        raise S3Error(
            "InvalidRequest",
            "Sign the request either in its Authorization header or in its query string.",
        )
    if authorization is not None:
        malformed = "AuthorizationHeaderMalformed"
        algorithm, _, rest = authorization.partition(" ")
        pairs = (pair.strip().partition("=") for pair in rest.split(","))
        fields = {name: value for name, _, value in pairs}
        fields["Date"] = request.headers.get("x-amz-date", "")
        expires = None
        payload = request.headers.get("x-amz-content-sha256", "")
    elif "X-Amz-Algorithm" in query:
        malformed = "AuthorizationQueryParametersError"
        algorithm = query["X-Amz-Algorithm"]
        fields = {name.removeprefix("X-Amz-"): value for name, value in query.items()}
        expires = fields.get("Expires", "")
        payload = request.headers.get("x-amz-content-sha256", UNSIGNED_PAYLOAD)
    elif "Signature" in query:
        algorithm = "AWS"
    else:
        raise S3Error("AccessDenied", "Access Denied: the request is not signed.")
    if algorithm != ALGORITHM:
        raise S3Error(
            "InvalidRequest",
            "The authorization mechanism you have provided is not supported. "
            f"Please use {ALGORITHM} (in boto3 signature_version='s3v4').",
        )
    try:
        access_key, day, region, service, end = fields["Credential"].rsplit("/", 4)
        headers, signature = fields["SignedHeaders"].split(";"), fields["Signature"]
    except (KeyError, ValueError):
        end = ""
    if end != "aws4_request":
        raise S3Error(
            malformed,
            "A signature needs Credential (key/date/region/s3/aws4_request), SignedHeaders and "
            "Signature.",
        )
    if payload not in NO_HASH and not re.fullmatch("[0-9a-f]{64}", payload):
        raise S3Error("InvalidRequest", "x-amz-content-sha256 is missing or not a hash.")
    return _Claim(
        malformed,
        access_key,
        day,
        region,
        service,
        fields.get("Date", ""),
        headers,
        signature,
        payload,
        expires,
    )


def _check_token(request: Request, query: Mapping[str, str]) -> None:
    if "x-amz-security-token" in request.headers or "X-Amz-Security-Token" in query:
        raise S3Error(
            "InvalidToken",
            "The provided token is malformed or otherwise invalid. "
            "The emulator's keys have no session token: unset AWS_SESSION_TOKEN.",
        )


def _check_all_are_signed(request: Request, signed: list[str]) -> None:
    # The WSGI environment does not distinguish underscores and hyphens in header names.
    names = {name.replace("_", "-") for name in signed}
    sent = {name.lower().replace("_", "-") for name, _ in request.headers}
    required = {name for name in sent if name.startswith("x-amz-")} | {"host"}
    if missing := required - names:
        raise S3Error(
            "AccessDenied",
            "There were headers present in the request which were not signed: "
            f"{', '.join(sorted(missing))}.",
        )


def _compare(computed: str, claimed: str) -> None:
    if not hmac.compare_digest(computed.encode(), claimed.encode()):
        raise S3Error(
            "SignatureDoesNotMatch",
            "The request signature we calculated does not match the signature you provided. "
            "Check your key and signing method.",
        )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
