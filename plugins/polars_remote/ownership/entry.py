"""Entry of a try in the record, and whether the try still owns the entry."""

from __future__ import annotations

import logging
import threading
import time

from ..errors import TakenOverError
from . import record
from .record import TaskRecord

logger = logging.getLogger(__name__)

OWNERSHIP_SECONDS = 5.0
"""Seconds for which a try counts as the latest before it asks Airflow again. Airflow starts the
next try only after a frozen worker's heartbeats have been missing for much longer."""


class TaskEntry:
    """Entry of a try in the record.

    If the worker is killed, the next try adopts the entry. The earlier try then no longer owns the
    entry, and must not submit or cancel queries.

    Attributes
    ----------
    key
        Key of the entry. Keys sort in the order of the tries, because ids are version 7 UUIDs.
    record
        Content of the entry.
    is_stored
        Whether the entry was written.
    lock
        Held while the record is changed.
    """

    def __init__(self, key: str, task: TaskRecord) -> None:
        self.key = key
        self.record = task
        self.is_stored = False
        self.lock = threading.RLock()
        self._owner_at = time.time()
        """When this try was last known to be the latest."""

    def save(self) -> None:
        self.is_stored = True
        record.put(self.key, self.record)

    def is_owned(self) -> bool:
        """Return whether this try is the latest. Asks Airflow once per `OWNERSHIP_SECONDS`."""
        if time.time() - self._owner_at > OWNERSHIP_SECONDS:
            asked_at = time.time()
            keys = record.find_keys(record.task_key(self.record.owner))
            if max(keys, default="") > self.key:
                return False
            self._owner_at = asked_at
        return True

    def check_owned(self) -> None:
        """Raise `TakenOverError` if a later try has adopted the entry."""
        if not self.is_owned():
            raise TakenOverError(
                "A later try of this task has adopted its queries: this try submits nothing"
            )

    def can_be_ended(self) -> bool:
        """Return whether this try may end the recorded queries and uses; never raises."""
        try:
            if self.is_owned():
                return True
            logger.warning("A later try of this task has adopted its queries: they keep running")
        except Exception as error:
            logger.warning("Airflow does not answer: the task's queries keep running (%s)", error)
        return False

    def restore(self) -> None:
        """Load the entry that this try wrote before it was deferred."""
        if stored := record.get_task(self.key):
            self.is_stored = True
            self.record = stored

    def adopt_earlier_tries(self) -> None:
        """Merge the entries of earlier tries into this try's entry, and erase them."""
        mine = self.record
        for key in sorted(record.find_keys(record.task_key(mine.owner))):
            if key < self.key and (earlier := record.get_task(key)):
                mine.queries |= earlier.queries
                mine.cluster_uses = [*dict.fromkeys(mine.cluster_uses + earlier.cluster_uses)]
                was_cleared = earlier.clear_number != mine.clear_number
                mine.is_stale = mine.is_stale or earlier.is_stale or was_cleared
                mine.unknown = earlier.unknown | mine.unknown
                self.save()
                record.erase(key)
