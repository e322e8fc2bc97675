"""WSGI middleware of the S3 port, which checks host, signature and body of each request."""

import io
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote

from werkzeug.wrappers import Request

from polars_cloud_emulator.protocol.own_hosts import is_own_host
from polars_cloud_emulator.storage.s3_bodies import read_body
from polars_cloud_emulator.storage.s3_errors import S3Error
from polars_cloud_emulator.storage.s3_signatures import STREAMED, SignatureCheck, raw_path

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LONGEST_KEY = 1_024
"""Maximum bytes of an object's key."""
FORMS = {"application/x-www-form-urlencoded", "multipart/form-data"}
"""Default content types of some clients, such as curl, for any body."""


class S3Middleware:
    """Passes complete and correctly signed requests on to an application, and refuses all others.

    Parameters
    ----------
    application
        WSGI application that handles the requests.
    check_signature
        Check of a request's signature.
    host
        Name or address that clients use for the S3.
    region_of
        Returns the region of a bucket, or None if the bucket does not exist.
    """

    def __init__(
        self,
        application: "WSGIApplication",
        check_signature: SignatureCheck,
        host: str,
        region_of: Callable[[str], str | None],
    ) -> None:
        self._application = application
        self._check_signature = check_signature
        self._host = host
        self._region_of = region_of

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        try:
            self._check(environ)
            return self._application(environ, start_response)
        except S3Error as error:
            refusal = error
        except OSError:
            raise  # the client disconnected
        except Exception as error:
            # moto raises various exceptions where it does not implement what S3 does.
            cause = f"{type(error).__name__}: {error}"
            refusal = S3Error("NotImplemented", f"The emulator's S3 cannot do this ({cause}).")
        return refusal.response()(environ, start_response)

    def _check(self, environ: "WSGIEnvironment") -> None:
        """Check the request, and replace its body in the environment by the decoded one.

        Raises
        ------
        S3Error
            The request is refused.
        """
        request = Request(environ)
        host = request.headers.get("host", "")
        if not is_own_host(host, (self._host, environ["werkzeug.socket"].getsockname()[0])):
            raise S3Error(
                "AccessDenied",
                f"The host '{host}' is not this emulator: use {self._host} or localhost, and put "
                "the bucket into the path (path-style), not into the host.",
            )
        bucket, key = _bucket_and_key(raw_path(environ))
        region = self._region_of(bucket)
        creates = request.method == "PUT" and not key
        is_missing = bucket and region is None and not creates
        try:
            signed = self._check_signature(request, datetime.now(UTC))
        except S3Error as error:
            # S3 reports a missing bucket to anonymous requests, too.
            if is_missing and error.code == "AccessDenied":
                raise _no_such_bucket() from None
            raise
        if is_missing:
            raise _no_such_bucket()
        if region not in {None, signed.region}:
            raise S3Error(
                "PermanentRedirect",
                "The bucket you are attempting to access must be addressed using the specified "
                f"endpoint. It is in {region}, and the request is for {signed.region}.",
                {"x-amz-bucket-region": str(region)},
            )
        body = read_body(request, signed)
        environ["wsgi.input"] = io.BytesIO(body.content)
        environ["CONTENT_LENGTH"] = str(len(body.content))
        # moto would take the bucket from the host, and the account from this header.
        environ["HTTP_HOST"] = "localhost"
        environ.pop("HTTP_X_MOTO_ACCOUNT_ID", None)
        if request.mimetype in FORMS:
            # moto would parse the object as a form.
            environ["CONTENT_TYPE"] = "binary/octet-stream"
        if signed.payload in STREAMED:
            environ.pop("HTTP_TRANSFER_ENCODING", None)
            environ["HTTP_X_AMZ_CONTENT_SHA256"] = "UNSIGNED-PAYLOAD"
            for name, value in body.checksums.items():
                environ[f"HTTP_{name.upper().replace('-', '_')}"] = value


def _no_such_bucket() -> S3Error:
    return S3Error("NoSuchBucket", "The specified bucket does not exist.")


def _bucket_and_key(path: str) -> tuple[str, str]:
    """Return the bucket and the key of a raw path.

    Raises
    ------
    S3Error
        The path is not valid UTF-8, or its key is too long.
    """
    try:
        bucket, _, key = unquote(path, errors="strict").removeprefix("/").partition("/")
    except UnicodeDecodeError:
        path = ""
    if not path.startswith("/") or not path.isascii() or "#" in path:
        raise S3Error("InvalidURI", "Couldn't parse the specified URI.")
    if len(key.encode()) > LONGEST_KEY:
        raise S3Error("KeyTooLongError", f"Your key is longer than {LONGEST_KEY} bytes.")
    return bucket, key
