"""The object store of the queries: the emulator's own S3, which is moto, or an external one."""

import hashlib
import shutil
import socket
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server import werkzeug_app
from moto.s3.models import s3_backends

from polars_cloud_emulator import sample_data
from polars_cloud_emulator.model.workspace import DATA_BUCKET, TEMPORARY_BUCKET
from polars_cloud_emulator.storage.persisted_objects import PersistedObjects
from polars_cloud_emulator.storage.s3_middleware import S3Middleware
from polars_cloud_emulator.storage.s3_server import S3Server
from polars_cloud_emulator.storage.s3_signatures import SignatureCheck

REGION = "us-east-1"
ACCESS_KEY = "emulator"
"""Access key id of the only pair of keys."""


class UnusableEnvironment(Exception):
    """The ``AWS_*`` variables do not configure an object store."""


class ObjectStore:
    """An S3 server on a listening socket. moto has one store per process.

    Parameters
    ----------
    host
        Name or address that clients use for the server.
    folder
        Folder for the objects.
    secret_key
        Secret access key of the clients.
    """

    temporary_uri = f"s3://{TEMPORARY_BUCKET}"
    """Prefix for results without a destination."""

    def __init__(self, listener: socket.socket, host: str, folder: Path, secret_key: str) -> None:
        self.endpoint_url = f"http://{host}:{listener.getsockname()[1]}"
        self._secret_key = secret_key
        self._persisted = PersistedObjects(folder, (DATA_BUCKET, TEMPORARY_BUCKET), REGION)
        # By default moto's CORS headers let every web page read its responses.
        werkzeug_app.DISABLE_GLOBAL_CORS = True  # type: ignore[attr-defined]
        # The other AWS services of moto are not served.
        moto = werkzeug_app.create_backend_app("s3")
        application = S3Middleware(
            self._persisted.wrap(moto),
            SignatureCheck(ACCESS_KEY, secret_key),
            host=host,
            region_of=self._region_of,
        )
        self._server = S3Server(listener, application)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which Polars, boto3 and other clients use this S3."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def write_sample_data(self, last_day: date) -> None:
        """Write the sample data; objects that are there and unchanged are skipped."""
        there = self._tags(DATA_BUCKET)
        for key, content in sample_data.parquet_files(last_day):
            if there.get(key) != _tag(content):
                self._persisted.put(DATA_BUCKET, key, content)

    def delete_result(self, query_id: object) -> None:
        """Delete the query's objects in the temporary bucket."""
        for key in list(self._bucket(TEMPORARY_BUCKET).keys):
            if key.startswith(f"{query_id}/"):
                self._persisted.delete(TEMPORARY_BUCKET, key)

    def clear(self, last_day: date) -> None:
        """Delete all buckets and objects, except sample data that is unchanged."""
        self._persisted.reset_buckets()
        sample = {key: _tag(content) for key, content in sample_data.parquet_files(last_day)}
        for bucket, expected in ((DATA_BUCKET, sample), (TEMPORARY_BUCKET, {})):
            for key, tag in self._tags(bucket).items():
                if expected.get(key) != tag:
                    self._persisted.delete(bucket, key)

    def load(self) -> None:
        """Load the objects on disk into moto."""
        self._persisted.load()

    def close(self) -> None:
        self._server.close()

    def _tags(self, bucket: str) -> dict[str, str]:
        """Return the ETag of each object, by key."""
        return {each.name: each.etag for each in list(self._bucket(bucket).keys.values())}

    @staticmethod
    def _bucket(name: str) -> Any:
        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[name]

    @staticmethod
    def _region_of(name: str) -> str | None:
        bucket = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets.get(name)
        return None if bucket is None else str(bucket.region_name)


def _tag(content: bytes) -> str:
    """Return the ETag of an object that is written in a single part."""
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


class OutsideObjectStore:
    """An external S3. Only queries write there; the emulator neither writes nor deletes.

    Parameters
    ----------
    environment
        The ``AWS_*`` variables of the S3; empty ones count as unset.
    results
        Folder for results without a destination.

    Raises
    ------
    UnusableEnvironment
        A variable is missing or wrong.
    """

    def __init__(self, environment: Mapping[str, str], results: Path) -> None:
        # Polars and boto3 would use an empty address or profile, and fail.
        self.environment = {
            name: value for name, value in environment.items() if name.startswith("AWS_") and value
        }
        missing = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} - self.environment.keys()
        if missing:
            raise UnusableEnvironment(f"set {' and '.join(sorted(missing))}")
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            url = self.environment.get(name, "https://")
            if not url.startswith(("http://", "https://")):
                raise UnusableEnvironment(f"{name} must begin with http:// or https://, not {url}")
        self.temporary_uri = str(results)
        self._results = results

    def write_sample_data(self, last_day: date) -> None:
        """Write nothing: the bucket is the user's."""

    def delete_result(self, query_id: object) -> None:
        shutil.rmtree(self._results / str(query_id), ignore_errors=True)

    def clear(self, last_day: date) -> None:
        """Delete the results; the bucket is the user's."""
        shutil.rmtree(self._results, ignore_errors=True)

    def load(self) -> None:
        """Load nothing: results are plain files, and the bucket is the user's."""

    def close(self) -> None:
        """Close nothing: there is no server."""
