"""Size of the journal."""

from emulator.tests.states import StoppedClock
from polars_cloud_emulator.protocol.journal import MAX_ENTRIES, Journal


def test_journal_keeps_the_latest_calls(clock: StoppedClock) -> None:
    journal = Journal(clock)
    for number in range(MAX_ENTRIES + 5):
        scope = {"type": "http", "method": "GET", "path": f"/{number}", "headers": []}
        journal.record(scope).status = 501 if number < 10 else 200
    assert len(journal.entries) == MAX_ENTRIES
    assert journal.entries[0].path == "/5"
    assert [entry.path for entry in journal.unmatched] == [f"/{n}" for n in range(5, 10)]
