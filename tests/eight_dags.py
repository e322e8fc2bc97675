"""The template's DAGs, and those that this clone has kept."""

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
