"""Make this clone's own secrets, once, and refuse settings that contradict each other.

Nothing of the kind is in the repository or an image.
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
    """End with a sentence when account and emulator would meet, in a setting or in the database."""
    emulator = os.environ["POLARS_CLOUD_EMULATOR"]
    if emulator == "1" and os.environ["POLARS_CLOUD_CLIENT_ID"]:
        sys.exit(
            "Refused: POLARS_CLOUD_CLIENT_ID is set, but Airflow is to talk to the emulator. "
            "For your account set POLARS_CLOUD_EMULATOR=0 in .env too."
        )
    first_start = KEYS / "polars-cloud-emulator"
    if not first_start.exists():
        first_start.write_text(emulator)
    if first_start.read_text() != emulator:
        sys.exit(
            "Refused: this database has run with POLARS_CLOUD_EMULATOR="
            f"{first_start.read_text()}, and its DAGs are paused or not accordingly. Begin anew "
            "with 'docker compose down --volumes'."
        )


def refuse_data_out_of_reach() -> None:
    """End with a sentence when the emulator's queries would not reach the DAGs' data."""
    data = urlsplit(os.environ.get("POLARS_CLOUD_DATA", ""))
    match os.environ["POLARS_CLOUD_EMULATOR_OBJECT_STORE"]:
        case "emulator":
            if data.scheme == "s3" and data.netloc != "your-bucket":
                sys.exit(
                    f"Refused: POLARS_CLOUD_DATA is {data.geturl()}, but the emulator has an "
                    "object store of its own. For yours set "
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
                "it can be emulator or environment."
            )


def main() -> None:
    refuse_a_mix()
    if os.environ["POLARS_CLOUD_EMULATOR"] == "1":
        refuse_data_out_of_reach()
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
