"""The objects of the store on disk: kept before a write is answered, and read from there.

moto answers everything else. It reads an object whole for each part of it that somebody asks for,
and forgets all of them with its process.
"""

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from werkzeug.exceptions import RequestedRangeNotSatisfiable
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LONGEST_NAME = 200
"""Characters of a file's or folder's name."""
PLAIN_READ = {"x-id"}
"""Parameters of a read that change nothing."""


class KeptObjects:
    """Files of the objects of some buckets.

    Parameters
    ----------
    folder
        Has a folder for each of the buckets.
    """

    def __init__(self, folder: Path, buckets: Iterable[str]) -> None:
        self._folder = folder
        self._buckets = set(buckets)
        self._writing = threading.Lock()
        for bucket in self._buckets:
            (folder / bucket).mkdir(parents=True, exist_ok=True)

    def each(self) -> Iterator[tuple[str, str, Path]]:
        """Bucket, key and file of every object."""
        for bucket in self._buckets:
            root = self._folder / bucket
            for path in root.rglob("*"):
                if path.is_file():
                    name = "".join(part.rstrip("+") for part in path.relative_to(root).parts)
                    yield bucket, unquote(name[1:]), path

    def kept(self, moto: "WSGIApplication") -> "WSGIApplication":
        """moto's application, with these buckets on disk."""

        def application(
            environ: "WSGIEnvironment", start_response: "StartResponse"
        ) -> Iterable[bytes]:
            request = Request(environ)
            bucket, _, key = request.path.lstrip("/").partition("/")
            if bucket not in self._buckets:
                return moto(environ, start_response)
            if request.method == "GET" and key and not request.args.keys() - PLAIN_READ:
                response = self._read(request, bucket, key)
                if response is not None:
                    return response(environ, start_response)
            elif request.method in {"PUT", "POST", "DELETE"} and (key or "delete" in request.args):
                return self._write(environ, start_response, moto, bucket, key)
            return moto(environ, start_response)

        return application

    def _read(self, request: Request, bucket: str, key: str) -> Response | None:
        """The object, or what was asked of it; None if moto has to answer."""
        backend = _moto()
        found = backend.get_object(bucket, key)
        path = self._path(bucket, key)
        # Whether somebody may read is for moto to say, and what is being written is there alone.
        if (
            found is None
            or backend.buckets[bucket].policy is not None
            or not _is_up_to_date(path, found)
        ):
            return None
        # To S3 a tail longer than the object is the whole object.
        tail = re.fullmatch(r"bytes=-(\d+)", request.headers.get("range", ""))
        asked = {"HTTP_RANGE": f"bytes=-{min(int(tail[1]), found.size)}"} if tail else {}
        try:
            response = send_file(
                path,
                {**request.environ, **asked},
                mimetype="binary/octet-stream",
                etag=found.etag.strip('"'),
                last_modified=found.last_modified,
                conditional=True,
            )
        except (RequestedRangeNotSatisfiable, ValueError):  # the latter of one that was replaced
            return None
        response.headers["accept-ranges"] = "bytes"
        for name, value in found.metadata.items():
            if name.lower().startswith(("content-type", "x-amz-meta-")):
                response.headers[name] = value
        return response

    def _write(
        self,
        environ: "WSGIEnvironment",
        start_response: "StartResponse",
        moto: "WSGIApplication",
        bucket: str,
        key: str,
    ) -> Iterable[bytes]:
        answered: list[tuple[Any, ...]] = []

        def wait(*arguments: Any) -> Callable[[bytes], object]:
            answered.append(arguments)
            return lambda _: None

        body = list(moto(environ, wait))
        try:
            # Without a key many are deleted at once.
            self._keep(bucket, [key] if key else [k for b, k, _ in self.each() if b == bucket])
        except OSError as error:
            refusal = Response(
                "<Error><Code>InternalError</Code><Message>The emulator cannot keep this object: "
                f"{error.strerror}.</Message></Error>",
                status=500,
                content_type="application/xml",
            )
            return refusal(environ, start_response)
        start_response(*answered[-1])
        return body

    def _keep(self, bucket: str, keys: Iterable[str]) -> None:
        with self._writing:
            for key in keys:
                while not self._is_kept(bucket, key):
                    pass

    def _is_kept(self, bucket: str, key: str) -> bool:
        """Keep the object; whether it was not replaced meanwhile."""
        found = _moto().get_object(bucket, key)
        path = self._path(bucket, key)
        if found is None:
            path.unlink(missing_ok=True)
            return True
        if _is_up_to_date(path, found):
            return True
        try:
            content = found.value
        except ValueError:  # moto has closed it, as there is a newer one
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the buckets: what is not whole is no object.
        part = self._folder / "part"
        try:
            part.write_bytes(content)
            os.utime(part, ns=(_written_at(found),) * 2)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return True

    def _path(self, bucket: str, key: str) -> Path:
        # Quoted, no key can leave the folder; marked, no part of one is another's file.
        name = "=" + quote(key, safe="")
        parts = [name[n : n + LONGEST_NAME] for n in range(0, len(name), LONGEST_NAME)]
        return Path(self._folder, bucket, *(f"{part}+" for part in parts[:-1]), parts[-1])


def _moto() -> Any:
    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


def _is_up_to_date(path: Path, found: Any) -> bool:
    try:
        return path.stat().st_mtime_ns == _written_at(found)
    except FileNotFoundError:
        return False


def _written_at(found: Any) -> int:
    return int(found.last_modified.timestamp() * 1e6) * 1000
