"""The state directory: certificates, secrets, state, plans, objects and results."""

import contextlib
import fcntl
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import trustme

LONGEST_PATH = 480
"""Maximum bytes of the directory's path; SQLite cannot open files with longer paths."""


class UnusableStateDirectory(Exception):
    """The state directory, or a file in it, cannot be used."""


class StateDirectory:
    """A directory that only this user can read, and that only one emulator can use at a time.

    Raises
    ------
    UnusableStateDirectory
        The path is in use, is not a directory, belongs to another user or is not writable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path = Path(os.path.realpath(path))
        self.trusted_certificates = path / "trusted-certificates"
        self.client_config = path / "client-config"
        self.objects = path / "buckets"
        self.results = path / "results"
        self.plans = path / "plans"
        self.server_certificate = path / "server.pem"
        self._authority_key = path / "certificate-authority.key"
        self._authority = self.trusted_certificates / "certificate-authority.pem"
        self._client_secret = path / "client-secret"
        self._object_store_secret = path / "object-store-secret"
        self.state = path / "state.sqlite"
        self._check_path()
        with self._explaining():
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.stat().st_uid != os.geteuid():
                raise UnusableStateDirectory(
                    f"the state directory {path} belongs to another user (user id "
                    f"{path.stat().st_uid}); choose another"
                )
            path.chmod(0o700)
            self._lock = self._locked()
            for folder in (self.trusted_certificates, self.client_config, self.plans):
                folder.mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Release the lock of the directory, which the end of the process does, too."""
        self._lock.close()

    def certificate_authority(self) -> trustme.CA:
        """Return the certificate authority, created once, so that clients trust a restart."""
        with self._explaining():
            if self._authority_key.exists():
                try:
                    return trustme.CA.from_pem(
                        self._authority.read_bytes(), self._authority_key.read_bytes()
                    )
                except ValueError:
                    raise UnusableStateDirectory(
                        f"{self._authority} or {self._authority_key} is damaged; delete both, "
                        "restart, and give clients the new certificate"
                    ) from None
        authority = trustme.CA(organization_name="Polars Cloud emulator")
        self.write(self._authority, authority.cert_pem.bytes())
        # The key is written last: without it, the next start creates both anew.
        self.write(self._authority_key, authority.private_key_pem.bytes())
        return authority

    def client_secret(self) -> str:
        """Return the secret of the first service account."""
        return self._secret(self._client_secret)

    def object_store_secret(self) -> str:
        """Return the secret access key of the emulator's own S3."""
        return self._secret(self._object_store_secret)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the directory atomically.

        Raises
        ------
        UnusableStateDirectory
            The file cannot be written, for example on a full disk.
        """
        part = self._path / "part"
        with self._explaining():
            part.unlink(missing_ok=True)
            part.touch(mode=0o600)
            part.write_bytes(content)
            part.replace(path)

    def _check_path(self) -> None:
        text = str(self._path)
        problem = None
        if len(os.fsencode(text)) > LONGEST_PATH:
            problem = f"is longer than {LONGEST_PATH} bytes"
        elif os.pathsep in text:
            problem = f"contains a '{os.pathsep}', which separates paths in SSL_CERT_DIR"
        elif not text.isprintable():
            problem = "contains a character that is not printable"
        if problem is not None:
            raise UnusableStateDirectory(
                f"the path of the state directory {text!a} {problem}; choose another"
            )

    def _locked(self) -> IO[str]:
        lock = (self._path / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read() or "another process"
            lock.close()
            raise UnusableStateDirectory(
                f"the state directory {self._path} is in use by the emulator in {holder}; stop "
                "that emulator, or choose another directory"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return lock

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnusableStateDirectory(
                f"the state directory {self._path} cannot be used: {error}"
            ) from None

    def _secret(self, path: Path) -> str:
        """Return a secret, created once, so that a client's environment survives a restart."""
        if not path.exists():
            self.write(path, secrets.token_urlsafe(32).encode())
        with self._explaining():
            secret = path.read_bytes()
        if re.fullmatch(rb"[!-~]+", secret) is None:
            raise UnusableStateDirectory(
                f"{path} is damaged; delete it, restart, and give clients the new secret"
            )
        return secret.decode()
