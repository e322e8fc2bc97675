"""The Connection type *Polars Cloud*."""

import json
import subprocess
import sys
from typing import Any

from airflow.sdk import BaseHook

from .cloud.session import ACCESS, REFUSED_LOGIN
from .settings import OUTAGE_SECONDS

LOG_IN = """
import json, sys
try:
    import polars_cloud
    polars_cloud.authenticate(**json.load(sys.stdin), interactive=False)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class PolarsCloudHook(BaseHook):
    """Hook of the Connection type: the labels of its form, and its test."""

    conn_name_attr = "conn_id"
    default_conn_name = "polars_cloud"
    conn_type = "polars_cloud"
    hook_name = "Polars Cloud"

    def __init__(self, conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.conn_id = conn_id

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """Return the labels of the form for Airflow 3.1. Later releases read the provider's."""
        return {
            "hidden_fields": ["host", "port", "schema"],
            "relabeling": {"login": "Client ID", "password": "Client secret"},
        }

    def test_connection(self) -> tuple[bool, str]:
        """Return whether Polars Cloud accepts the login, and a message.

        The login runs in a subprocess, so that Airflow's API server does not have to import the
        client.
        """
        connection = self.get_connection(self.conn_id)
        account = {"client_id": connection.login, "client_secret": connection.password}
        if not connection.login and ACCESS & connection.extra_dejson.keys():
            return False, "Nothing to test: a Connection for clusters of your own has no login"
        if not (connection.login and connection.password):
            return False, "Set login = client ID and password = client secret"
        try:
            ran = subprocess.run(
                [sys.executable, "-P", "-c", LOG_IN],
                input=json.dumps(account),
                capture_output=True,
                text=True,
                timeout=OUTAGE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False, f"Polars Cloud did not answer within {OUTAGE_SECONDS:.0f} s"
        if ran.returncode == 0:
            return True, "Polars Cloud accepts this login"
        if REFUSED_LOGIN in ran.stderr:
            return False, "Polars Cloud refuses this client ID and client secret"
        # Without the hint to log in with a browser.
        reason = ran.stderr.partition("\n\t")[0].strip()
        return False, (
            "Could not log in to Polars Cloud: where Airflow's API server runs, check that "
            "polars-cloud is installed, and check the network and, if set, POLARS_CLOUD_API_ADDR "
            f"and POLARS_CLOUD_DOMAIN ({reason.replace(connection.password, '***')})"
        )
