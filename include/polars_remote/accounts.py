"""Let several service accounts take turns in one process: the client has one login for all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .login import log_in

_turns = threading.Condition()
_account: str | None = None
_users = 0
_waiting: list[str] = []


@contextmanager
def acting_as(conn_id: str) -> Iterator[None]:
    """Call Polars Cloud with this Connection's login, and keep others from logging in meanwhile.

    Any number of threads may act as the same account. Those who act as another one wait.

    Raises
    ------
    AirflowFailException, ConnectionError, ValueError
        As `include.auth.authenticate`.
    """
    global _account, _users
    with _turns:
        _waiting.append(conn_id)
        # First come, first served: nobody overtakes another account that waits.
        _turns.wait_for(
            lambda: (
                (not _users and _waiting[0] == conn_id)
                or (_account == conn_id and set(_waiting) == {conn_id})
            )
        )
        _waiting.remove(conn_id)
        if _account != conn_id:
            _account = None
            if error := log_in(conn_id):
                _turns.notify_all()
                raise error
            _account = conn_id
        _users += 1
        _turns.notify_all()
    try:
        yield
    finally:
        with _turns:
            _users -= 1
            _turns.notify_all()
