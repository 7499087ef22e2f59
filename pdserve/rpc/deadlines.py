"""Deadlines: points of this process's monotonic clock inside, *remaining* time on the wire."""

from __future__ import annotations

import math
import time

# About 317 years; a deadline of infinity travels as this.
MAX_REMAINING_MS = 10**13


def remaining_ms(deadline: float) -> int:
    """Milliseconds until ``deadline`` (seconds of time.monotonic()), 0 when it has passed."""
    left = (deadline - time.monotonic()) * 1000
    return max(0, math.floor(left)) if left < MAX_REMAINING_MS else MAX_REMAINING_MS


def deadline_after(milliseconds: int) -> float:
    """The point of time.monotonic() that lies so far ahead; infinity for the largest value."""
    if milliseconds >= MAX_REMAINING_MS:
        return math.inf
    return time.monotonic() + milliseconds / 1000
