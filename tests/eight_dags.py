"""The DAGs of the template, of which a copy of it keeps what it needs."""

from local_airflow import PATTERNS

EIGHT_DAGS = {
    "complete_pipeline",
    "context_manager_shutdown",
    "manifest_reuse",
    "manual_shutdown",
    "multi_stage",
    "parallel_single_node",
    "single_query",
    "status_check",
}
KEPT = EIGHT_DAGS & {*PATTERNS}
DELETED = EIGHT_DAGS - KEPT
