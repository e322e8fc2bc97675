"""The Asset event of the daily report starts the DAG in docs/helpers.md."""

import pytest

from polars_cloud_emulator.testing import eventually
from tests.failures.deployment import Deployment, Run


@pytest.mark.dag("complete_pipeline")
def test_the_event_of_the_daily_report_starts_another_dag(airflow: Deployment) -> None:
    def runs() -> list[Run]:
        answer = airflow.call("GET", "dags/mail_report/dagRuns?state=success&limit=100")
        return [Run(airflow, "mail_report", run["dag_run_id"]) for run in answer["dag_runs"]]

    before = len(runs())
    report = airflow.trigger("complete_pipeline")
    report.wait_for_end()
    eventually(lambda: len(runs()) > before, pause=0.5)
    assert "rows in ['s3://your-bucket/reports/daily/" in runs()[-1].log()
