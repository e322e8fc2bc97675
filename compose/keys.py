"""Make this clone's own secrets, once: nothing of the kind is in the repository or an image."""

import base64
import json
import secrets
from pathlib import Path

KEYS = Path("/keys")


def main() -> None:
    if (KEYS / "airflow.env").exists():
        return
    database_password = secrets.token_urlsafe(24)
    (KEYS / "postgres-password").write_text(database_password)
    (KEYS / "login.json").write_text(json.dumps({"admin": secrets.token_urlsafe(9)}))
    database = f"postgresql+psycopg2://airflow:{database_password}@postgres/airflow"
    variables = {
        "AIRFLOW__CORE__FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_urlsafe(48),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database,
    }
    # Last: its presence says that all of them are there.
    (KEYS / "airflow.env").write_text("".join(f"{k}={v}\n" for k, v in variables.items()))


if __name__ == "__main__":
    main()
