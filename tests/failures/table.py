"""The tables of docs/failures.md, from what the scenarios are tested to end in."""

from tests.failures.scenarios import GROUPS, SCENARIOS, Expected, Scenario

IDLE_BY_DESIGN = ("single_query", "status_check", "manifest_reuse", "left_beside_scope")
NOTHING = "nothing"


def overview() -> str:
    """Return one Markdown row per group."""
    return _table(
        ("what happens", "how the DAGs handle it", "kinds tested"),
        [(each.heading, each.outcome, str(len(each.scenarios))) for each in GROUPS],
    )


def exceptions() -> str:
    """Return one Markdown row per scenario that leaves something running."""
    return _table(
        ("what happens", "left running"),
        [
            (what, left)
            for what, scenario in SCENARIOS.items()
            if (left := _left_running(scenario)) != NOTHING
        ],
    )


def listing() -> str:
    """Return a Markdown table for each group, with one row per scenario."""
    return "\n\n".join(
        f"### {group.heading}\n\n"
        + _table(
            ("what happens", "run", "what the log says", "left running"),
            [_row(what, scenario) for what, scenario in group.scenarios.items()],
        )
        for group in GROUPS
    )


def _row(what: str, scenario: Scenario) -> tuple[str, ...]:
    ends = scenario.expected.values()
    states = " or ".join(sorted({expected.run for expected in ends}))
    causes = sorted({expected.cause for expected in ends})
    says = ", ".join(f"*{cause.replace('.*', '…').replace('|', '* or *')}*" for cause in causes)
    return what, states, says, _left_running(scenario)


def _left_running(scenario: Scenario) -> str:
    ends = scenario.expected.items()
    return " or ".join(sorted({_left_by(dag_id, expected) for dag_id, expected in ends}))


def _left_by(dag_id: str, expected: Expected) -> str:
    if expected.queries_left:
        return "the query, until it ends"
    if expected.clusters_left and not dag_id.startswith(IDLE_BY_DESIGN):
        return "the cluster, until its idle timeout"
    return NOTHING


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
