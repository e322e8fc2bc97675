"""Tell where to look, once everything runs."""

import json
import os
from pathlib import Path

login = json.loads(Path("/keys/login.json").read_text())
print(f"Airflow: http://127.0.0.1:{os.environ['AIRFLOW_PORT']}")
for user, password in login.items():
    print(f"Login: {user} / {password}")
if os.environ["POLARS_CLOUD_EMULATOR"] == "1":
    print("Polars Cloud: the emulator. Each DAG runs once by itself.", flush=True)
else:
    print("Polars Cloud: your account. All DAGs are paused: each run is billed.", flush=True)
