"""The objects of the store on disk: kept before a write is answered, and read from there.

moto answers everything else. It reads an object whole for each part of it that somebody asks for,
and forgets all of them with its process.
"""

import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from werkzeug.exceptions import RequestedRangeNotSatisfiable
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response
from werkzeug.wsgi import FileWrapper

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
    region
        Where the buckets are.
    """

    def __init__(self, folder: Path, buckets: Iterable[str], region: str) -> None:
        self._folder = folder
        self._buckets = set(buckets)
        self._turn = threading.Lock()
        for bucket in self._buckets:
            (folder / bucket).mkdir(parents=True, exist_ok=True)
            if bucket not in _moto().buckets:  # of an emulator that this process ran before
                _moto().create_bucket(bucket, region)

    def each(self) -> Iterator[tuple[str, str, Path]]:
        """Bucket, key and file of every object."""
        for bucket in self._buckets:
            root = self._folder / bucket
            for path in root.rglob("*"):
                if path.is_file():
                    name = "".join(part.rstrip("+") for part in path.relative_to(root).parts)
                    yield bucket, unquote(name[1:]), path

    def put(self, bucket: str, key: str, content: bytes) -> None:
        with self._turn:
            _moto().put_object(bucket, key, content)
            self._keep(bucket, key)

    def delete(self, bucket: str, key: str) -> None:
        with self._turn:
            _moto().delete_object(bucket, key)
            self._keep(bucket, key)

    def kept(self, moto: "WSGIApplication") -> "WSGIApplication":
        """moto's application, with these buckets on disk."""

        def application(
            environ: "WSGIEnvironment", start_response: "StartResponse"
        ) -> Iterable[bytes]:
            request = Request(environ)
            bucket, _, key = request.path.lstrip("/").partition("/")
            if bucket not in self._buckets or not (key or "delete" in request.args):
                return moto(environ, start_response)
            if request.method == "GET" and not request.args.keys() - PLAIN_READ:
                response = self._read(request, bucket, key)
                if response is not None:
                    return response(environ, start_response)
            # Before its turn: a client may take long to send it.
            body = request.get_data()
            environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
            # One at a time: moto closes an object that is replaced while others read it.
            with self._turn:
                if request.method in {"PUT", "POST", "DELETE"}:
                    return self._write(environ, start_response, moto, bucket, key)
                return list(moto(environ, start_response))

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
        tail = re.fullmatch(r"bytes=-(\d+)", request.headers.get("range", ""))
        try:
            # To S3 a tail longer than the object is the whole object.
            asked = {"HTTP_RANGE": f"bytes=-{min(int(tail[1]), found.size)}"} if tail else {}
            response = send_file(
                path,
                {**request.environ, **asked, "wsgi.file_wrapper": _in_large_parts},
                mimetype="binary/octet-stream",
                etag=found.etag.strip('"'),
                last_modified=found.last_modified,
                conditional=True,
            )
        # The latter two of one that has been replaced or deleted since.
        except (RequestedRangeNotSatisfiable, ValueError, FileNotFoundError):
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
            for each in [key] if key else [k for b, k, _ in self.each() if b == bucket]:
                self._keep(bucket, each)
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

    def _keep(self, bucket: str, key: str) -> None:
        found = _moto().get_object(bucket, key)
        path = self._path(bucket, key)
        if found is None:
            path.unlink(missing_ok=True)
            return
        if _is_up_to_date(path, found):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the buckets: what is not whole is no object.
        part = self._folder / "part"
        try:
            part.write_bytes(found.value)
            os.utime(part, ns=(_written_at(found),) * 2)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _path(self, bucket: str, key: str) -> Path:
        # Quoted, no key can leave the folder; marked, no part of one is another's file.
        name = "=" + quote(key, safe="")
        parts = [name[n : n + LONGEST_NAME] for n in range(0, len(name), LONGEST_NAME)]
        return Path(self._folder, bucket, *(f"{part}+" for part in parts[:-1]), parts[-1])


def _in_large_parts(file: IO[bytes], size: int) -> FileWrapper:
    """Send a megabyte at a time: of the usual 8 kB, Python would have to handle each."""
    return FileWrapper(file, 2**20)


def _moto() -> Any:
    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


def _is_up_to_date(path: Path, found: Any) -> bool:
    try:
        return path.stat().st_mtime_ns == _written_at(found)
    except FileNotFoundError:
        return False


def _written_at(found: Any) -> int:
    return int(found.last_modified.timestamp() * 1e6) * 1000
