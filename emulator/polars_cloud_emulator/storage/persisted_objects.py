"""Objects of the S3 on disk: each is written to a file before moto stores it, and read from there.

moto handles all other requests. On its own it loses its objects when the process ends, and reads a
whole object for each range request.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.exceptions import S3ClientError
from moto.s3.models import FakeBucket, FakeKey, s3_backends
from moto.s3.utils import _VersionedKeyStore
from werkzeug.wrappers import Request, Response

from polars_cloud_emulator.model.errors import CannotPersist
from polars_cloud_emulator.storage import plain_reads
from polars_cloud_emulator.storage.plain_reads import EPOCH, written_at

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LONGEST_NAME = 200
"""Maximum characters of a file or folder name."""


class PersistedObjects:
    """Files of the objects of some buckets.

    Parameters
    ----------
    folder
        Parent folder of the buckets' folders.
    region
        AWS region of the buckets.
    """

    def __init__(self, folder: Path, buckets: Iterable[str], region: str) -> None:
        self._folder = folder
        self._buckets = set(buckets)
        self._region = region
        self._lock = threading.Lock()
        self._write_error: OSError | None = None
        """Error of the write in progress; None if it succeeded so far."""
        for bucket in self._buckets:
            self._make_bucket(bucket, _KeysOnDisk(self, bucket))

    def load(self) -> None:
        """Load the objects on disk into moto."""
        for bucket in self._buckets:
            root = self._folder / bucket
            for path in [path for path in root.rglob("*") if path.is_file()]:
                name = "".join(part.rstrip("+") for part in path.relative_to(root).parts)
                key = unquote(name[1:])
                found = FakeKey(key, path.read_bytes(), DEFAULT_ACCOUNT_ID, self._region)
                found.bucket_name = bucket
                found.last_modified = EPOCH + timedelta(
                    microseconds=path.stat().st_mtime_ns // 1000
                )
                _moto().buckets[bucket].keys.setlist(key, [found])

    def put(self, bucket: str, key: str, content: bytes) -> None:
        """Write an object.

        Raises
        ------
        CannotPersist
            The object cannot be written, for example on a full disk.
        """
        with self._lock:
            try:
                _moto().put_object(bucket, key, content)
            except _WriteFailed as failed:
                raise CannotPersist(failed.cause) from None

    def delete(self, bucket: str, key: str) -> None:
        """Delete an object.

        Raises
        ------
        CannotPersist
            The object cannot be deleted, for example on a read-only disk.
        """
        with self._lock:
            try:
                _moto().delete_object(bucket, key)
            except _WriteFailed as failed:
                raise CannotPersist(failed.cause) from None

    def reset_buckets(self) -> None:
        """Delete all other buckets, and reset the settings of these; their objects stay."""
        with self._lock:
            for name in _moto().buckets.keys() - self._buckets:
                _moto().buckets[name].keys.clear()
                _moto().delete_bucket(name)
            for name in self._buckets:
                before = _moto().buckets.get(name)
                # Objects of a versioned bucket, or of one that a client created anew, do not stay.
                if (
                    before is not None
                    and before.versioning_status is None
                    and isinstance(before.keys, _KeysOnDisk)
                ):
                    self._make_bucket(name, before.keys)
                else:
                    shutil.rmtree(self._folder / name)
                    self._make_bucket(name, _KeysOnDisk(self, name))

    def _make_bucket(self, name: str, keys: "_KeysOnDisk") -> None:
        (self._folder / name).mkdir(parents=True, exist_ok=True)
        bucket: Any = FakeBucket(name, DEFAULT_ACCOUNT_ID, self._region)  # type: ignore[abstract]
        bucket.keys = keys
        bucket.multiparts = {}  # a plain dict does not dispose of an upload that is removed
        _moto().buckets[name] = bucket

    def wrap(self, moto: "WSGIApplication") -> "WSGIApplication":
        """Return a WSGI application that answers like moto's, with these buckets on disk."""

        def application(
            environ: "WSGIEnvironment", start_response: "StartResponse"
        ) -> Iterable[bytes]:
            request = Request(environ)
            name, _, key = request.path.lstrip("/").partition("/")
            if name not in self._buckets or name not in _moto().buckets:
                return moto(environ, start_response)
            bucket = _moto().buckets[name]
            answer = (
                plain_reads.reading(request, _moto(), bucket, key, self._path(name, key))
                if key
                else plain_reads.listing(request, _moto(), bucket)
            )
            if answer is not None:
                start_response(answer.status, answer.headers)
                return answer.content
            if not (key or "delete" in request.args):
                return moto(environ, start_response)
            # One request at a time: moto closes a replaced object even while it is being read.
            with self._lock:
                if request.method in {"PUT", "POST", "DELETE"}:
                    return self._write(environ, start_response, moto, name)
                return list(moto(environ, start_response))

        return application

    def _write(
        self,
        environ: "WSGIEnvironment",
        start_response: "StartResponse",
        moto: "WSGIApplication",
        bucket: str,
    ) -> Iterable[bytes]:
        uploads = _moto().buckets[bucket].multiparts
        before = dict(uploads)
        self._write_error = None
        answered: list[tuple[Any, ...]] = []

        def wait(*arguments: Any) -> Callable[[bytes], object]:
            answered.append(arguments)
            return lambda _: None

        body = list(moto(environ, wait))
        # moto removes a multipart upload before it stores the whole object.
        ended = [upload for upload in before if upload not in uploads]
        if self._write_error is not None:
            uploads |= {upload: before[upload] for upload in ended}
            refusal = Response(
                "<Error><Code>InternalError</Code><Message>The emulator cannot store this object: "
                f"{self._write_error.strerror}.</Message></Error>",
                status=500,
                content_type="application/xml",
            )
            return refusal(environ, start_response)
        for upload in ended:
            before[upload].dispose()
        start_response(*answered[-1])
        return body

    def write_file(self, bucket: str, key: str, found: FakeKey) -> None:
        """Write the file of an object, unless it is up to date.

        Raises
        ------
        _WriteFailed
            The file cannot be written, for example on a full disk; it is unchanged.
        """
        path = self._path(bucket, key)
        _ = found.etag  # moto computes it on first access, and wrongly for two at the same time
        # Outside the buckets' folders, because an incomplete file is not an object.
        part = self._folder / "part"
        with self._catching_errors():
            if _is_current(path, found):
                return
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(found.value)
                os.utime(part, ns=(written_at(found),) * 2)
                part.replace(path)
            except OSError:
                found.multipart = None  # else disposing of the object would delete the parts
                raise
            finally:
                part.unlink(missing_ok=True)

    def delete_file(self, bucket: str, key: str) -> None:
        """Delete the file of an object, if it exists.

        Raises
        ------
        _WriteFailed
            The file cannot be deleted.
        """
        with self._catching_errors():
            self._path(bucket, key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _catching_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._write_error = error
            raise _WriteFailed(error) from None

    def _path(self, bucket: str, key: str) -> Path:
        # Quoting keeps every key inside the folder. The marks = and + keep the folders of a long
        # key apart from the file of a shorter one.
        name = "=" + quote(key, safe="")
        parts = [name[n : n + LONGEST_NAME] for n in range(0, len(name), LONGEST_NAME)]
        return Path(self._folder, bucket, *(f"{part}+" for part in parts[:-1]), parts[-1])


class _WriteFailed(S3ClientError):
    """A file cannot be written or deleted. moto logs no traceback for an ``S3ClientError``."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _KeysOnDisk(_VersionedKeyStore):
    """moto's key store of a bucket; each object is written to disk before it is stored."""

    def __init__(self, objects: PersistedObjects, bucket: str) -> None:
        super().__init__()
        self._objects = objects
        self._bucket = bucket

    def __setitem__(self, key: str, value: Any) -> None:
        self._write_file(key, value)
        super().__setitem__(key, value)

    def setlist(self, key: str, list_: Any) -> None:
        self._write_file(key, list_[-1] if list_ else None)
        super().setlist(key, list_)

    def pop(self, key: str) -> None:  # type: ignore[override]
        self._objects.delete_file(self._bucket, key)
        super().pop(key)

    def _write_file(self, key: str, latest: Any) -> None:
        if isinstance(latest, FakeKey):
            self._objects.write_file(self._bucket, key, latest)
        else:  # a delete marker
            self._objects.delete_file(self._bucket, key)


def _moto() -> Any:
    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


def _is_current(path: Path, found: FakeKey) -> bool:
    try:
        return path.stat().st_mtime_ns == written_at(found)
    except FileNotFoundError:
        return False
