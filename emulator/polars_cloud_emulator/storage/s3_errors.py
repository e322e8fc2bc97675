"""Error responses of S3: an error code and a message."""

from xml.sax.saxutils import escape

from werkzeug.wrappers import Response

STATUS = {
    "AccessDenied": 403,
    "AuthorizationHeaderMalformed": 400,
    "AuthorizationQueryParametersError": 400,
    "EntityTooLarge": 400,
    "IncompleteBody": 400,
    "InternalError": 500,
    "InvalidAccessKeyId": 403,
    "InvalidRequest": 400,
    "InvalidToken": 400,
    "InvalidURI": 400,
    "KeyTooLongError": 400,
    "MissingContentLength": 411,
    "NoSuchBucket": 404,
    "NoSuchService": 404,
    "NotImplemented": 501,
    "PermanentRedirect": 301,
    "RequestTimeTooSkewed": 403,
    "SignatureDoesNotMatch": 403,
    "XAmzContentSHA256Mismatch": 400,
}
"""HTTP status of each error code. Only ``NoSuchService`` is not a code of S3."""


class S3Error(Exception):
    """A refused request.

    Parameters
    ----------
    code
        One of ``STATUS``.
    message
        Description of the problem.
    headers
        Further headers of the response.
    """

    def __init__(self, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self._headers = headers

    def response(self) -> Response:
        # XML allows no control characters but tab, line feed and carriage return.
        message = "".join(c for c in str(self) if c.isprintable() or c in "\t\n\r")
        return Response(
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{self.code}</Code><Message>{escape(message)}</Message></Error>",
            status=STATUS[self.code],
            headers=self._headers,
            content_type="application/xml",
        )
