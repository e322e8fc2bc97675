"""What outlives one run of the emulator: certificates, secrets, the rest."""

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
"""Bytes. SQLite opens no file whose path is much longer."""


class UnusableStateDirectory(Exception):
    """With the directory, or the file in it, and what to do."""


class StateDirectory:
    """A directory that only this user can read, and that one emulator uses at a time.

    Raises
    ------
    UnusableStateDirectory
        It is in use, is no directory, belongs to another user or cannot be written.
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
        """Let another emulator use the directory. The end of the process does it, too."""
        self._lock.close()

    def certificate_authority(self) -> trustme.CA:
        """The authority of the first run, so that a client's trust survives a restart."""
        with self._explaining():
            if self._authority_key.exists():
                try:
                    return trustme.CA.from_pem(
                        self._authority.read_bytes(), self._authority_key.read_bytes()
                    )
                except ValueError:
                    raise UnusableStateDirectory(
                        f"{self._authority} or {self._authority_key} is damaged; delete both, and "
                        "give clients the new certificate"
                    ) from None
        authority = trustme.CA(organization_name="Polars Cloud emulator")
        self.write(self._authority, authority.cert_pem.bytes())
        # Last: as long as it is missing, the certificate is made anew.
        self.write(self._authority_key, authority.private_key_pem.bytes())
        return authority

    def client_secret(self) -> str:
        """The first service account's."""
        return self._secret(self._client_secret)

    def object_store_secret(self) -> str:
        """The secret access key of the emulator's own S3."""
        return self._secret(self._object_store_secret)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the directory, whole or not at all.

        Raises
        ------
        UnusableStateDirectory
            It cannot be written, as on a full disk.
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
            problem = f"has a '{os.pathsep}', which ends it in SSL_CERT_DIR"
        elif not text.isprintable():
            problem = "has a character that cannot be printed"
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
                "that one, or choose another directory"
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
        """The secret of the first run, so that a client's environment survives a restart."""
        if not path.exists():
            self.write(path, secrets.token_urlsafe(32).encode())
        with self._explaining():
            secret = path.read_bytes()
        if re.fullmatch(rb"[!-~]+", secret) is None:
            raise UnusableStateDirectory(
                f"{path} is damaged; delete it, and give clients the new secret"
            )
        return secret.decode()
