"""The table of docs/failures.md, made from the tested scenarios."""

from tests.failures.scenarios import SCENARIOS, Expected

IDLE_BY_DESIGN = ("single_query", "status_check", "manifest_reuse", "left_beside_scope")


def table() -> str:
    """Return one Markdown row per scenario."""
    rows = ["| what happens | run | what the log says | left running |", "|---|---|---|---|"]
    for what, scenario in SCENARIOS.items():
        ends = scenario.expected.items()
        states = " or ".join(sorted({expected.run for _, expected in ends}))
        causes = sorted({expected.cause for _, expected in ends})
        says = ", ".join(f"*{cause.replace('.*', '…').replace('|', '* or *')}*" for cause in causes)
        left = " or ".join(sorted({left_running(dag_id, expected) for dag_id, expected in ends}))
        rows.append(f"| {what} | {states} | {says} | {left} |")
    return "\n".join(rows)


def left_running(dag_id: str, expected: Expected) -> str:
    if expected.queries_left:
        return "the query, to its end"
    if expected.clusters_left and not dag_id.startswith(IDLE_BY_DESIGN):
        return "the cluster, to its idle timeout"
    return "nothing"
