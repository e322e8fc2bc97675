"""What outlives one run of the emulator: certificates, the first account's secret, the rest."""

import secrets
from pathlib import Path

import trustme


class StateDirectory:
    """A directory that only this user can read."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        self.trusted_certificates = path / "trusted-certificates"
        self.client_config = path / "client-config"
        self.objects = path / "buckets"
        self.results = path / "results"
        self.workers = path / "workers"
        self.plans = path / "plans"
        self.server_certificate = path / "server.pem"
        self._authority_key = path / "certificate-authority.key"
        self._authority = self.trusted_certificates / "certificate-authority.pem"
        self._client_secret = path / "client-secret"
        self.state = path / "state.sqlite"
        for directory in (self.trusted_certificates, self.client_config, self.workers, self.plans):
            directory.mkdir(exist_ok=True)

    def certificate_authority(self) -> trustme.CA:
        """The authority of the first run, so that a client's trust survives a restart."""
        if self._authority_key.exists():
            return trustme.CA.from_pem(
                self._authority.read_bytes(), self._authority_key.read_bytes()
            )
        authority = trustme.CA(organization_name="Polars Cloud emulator")
        authority.cert_pem.write_to_path(self._authority)
        authority.private_key_pem.write_to_path(self._authority_key)
        return authority

    def client_secret(self) -> str:
        if not self._client_secret.exists():
            self._client_secret.write_text(secrets.token_urlsafe(32))
        return self._client_secret.read_text()
