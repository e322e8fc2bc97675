"""An empty secrets backend that records each lookup."""

from airflow.secrets.base_secrets import BaseSecretsBackend

accesses: list[str] = []


class RecordingSecrets(BaseSecretsBackend):
    """Secrets backend that Airflow asks first."""

    def get_conn_value(self, conn_id: str, team_name: str | None = None) -> None:
        accesses.append(f"Connection {conn_id}")

    def get_variable(self, key: str, team_name: str | None = None) -> None:
        accesses.append(f"Variable {key}")
