"""Refuse settings that contradict each other, and create this clone's secrets at its first start.

The repository and the images contain no secrets.
"""

import base64
import json
import os
import secrets
import sys
from pathlib import Path
from urllib.parse import urlsplit

KEYS = Path("/keys")


def refuse_a_mix() -> None:
    """Exit with an error if the settings or the database mix the account and the emulator."""
    emulator = os.environ["POLARS_CLOUD_EMULATOR"]
    if emulator == "1" and os.environ["POLARS_CLOUD_CLIENT_ID"]:
        sys.exit(
            "Refused: POLARS_CLOUD_CLIENT_ID is set, but POLARS_CLOUD_EMULATOR is 1. "
            "To use your account, set POLARS_CLOUD_EMULATOR=0 in .env too."
        )
    first_start = KEYS / "polars-cloud-emulator"
    if not first_start.exists():
        first_start.write_text(emulator)
    if first_start.read_text() != emulator:
        sys.exit(
            "Refused: this database was created with POLARS_CLOUD_EMULATOR="
            f"{first_start.read_text()}, which also decided whether its DAGs are paused. To delete "
            "it and its history: docker compose down --volumes"
        )


def refuse_data_out_of_reach() -> None:
    """Exit with an error if the emulator's queries cannot reach the DAGs' data."""
    data = urlsplit(os.environ.get("POLARS_CLOUD_DATA", ""))
    match os.environ["POLARS_CLOUD_EMULATOR_OBJECT_STORE"]:
        case "emulator":
            if data.scheme == "s3" and data.netloc != "your-bucket":
                sys.exit(
                    f"Refused: POLARS_CLOUD_DATA is {data.geturl()}, but the emulator uses its own "
                    "object store. To use your bucket, set "
                    "POLARS_CLOUD_EMULATOR_OBJECT_STORE=environment in .env too."
                )
        case "environment":
            needed = ("POLARS_CLOUD_DATA", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
            if missing := [name for name in needed if not os.environ.get(name)]:
                sys.exit(
                    "Refused: POLARS_CLOUD_EMULATOR_OBJECT_STORE is environment, but .env lacks "
                    f"{', '.join(missing)}."
                )
        case other:
            sys.exit(
                f"Refused: POLARS_CLOUD_EMULATOR_OBJECT_STORE is {other}; "
                "set it to emulator or environment."
            )


def main() -> None:
    refuse_a_mix()
    ports = {"Airflow": "AIRFLOW_PORT"}
    if os.environ["POLARS_CLOUD_EMULATOR"] == "1":
        refuse_data_out_of_reach()
        ports["The emulator"] = "POLARS_CLOUD_EMULATOR_PORT"
    # Docker's error about a taken port does not name the variable.
    for service, variable in ports.items():
        print(f"{service} uses port {os.environ[variable]}. If it is taken, set {variable}.")
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
    # Written last: if this file exists, all secrets do.
    (KEYS / "airflow.env").write_text("".join(f"{k}={v}\n" for k, v in variables.items()))


if __name__ == "__main__":
    main()
