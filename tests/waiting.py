"""Waiting in tests: for a condition, with a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(condition: Callable[[], T], seconds: float = 120.0, *, pause: float = 0.01) -> T:
    """The first true value of ``condition``; an AssertionError when there is none in time.

    Parameters
    ----------
    seconds
        Until the condition has to hold.
    pause
        Seconds between two looks; more where looking slows down what is waited for.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        time.sleep(pause)
    return value
