"""Tell where to look, once everything runs."""

import json
import os
from pathlib import Path

login = json.loads(Path("/keys/login.json").read_text())
print(f"Airflow: http://127.0.0.1:{os.environ['AIRFLOW_PORT']}")
for user, password in login.items():
    print(f"Login: {user} / {password}")
if os.environ["POLARS_CLOUD_EMULATOR"] == "1":
    print(f"Clusters: http://127.0.0.1:{os.environ['POLARS_CLOUD_EMULATOR_PORT']}")
match os.environ["POLARS_CLOUD_EMULATOR"], os.environ["POLARS_CLOUD_EMULATOR_OBJECT_STORE"]:
    case "1", "emulator":
        polars_cloud = "the emulator. Each DAG but preflight runs once by itself."
    case "1", _:
        polars_cloud = "the emulator, with your bucket. All DAGs are paused: they write there."
    case _:
        polars_cloud = "your account. All DAGs are paused: each run is billed, but for preflight."
print(f"Polars Cloud: {polars_cloud}", flush=True)
