"""What the router concludes by itself about a worker's cache, before any event says so.

A request that just finished left its blocks with its workers. Their events will say the same a
little later; until then, and for good where events are off, these notes let the next turn of a chat
find its way. A note that is wrong costs a worse placement, never a wrong answer. Notes are bounded
by the worker's pool, oldest out first, and expire where events are on: an event that a block was
removed may have come before the note.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pdserve.types import BlockKey


class KvNotes:
    """One worker incarnation's notes. ``ttl_s``: infinity where no events come."""

    def __init__(self, capacity: int, ttl_s: float) -> None:
        self._capacity = max(1, capacity)
        self._ttl_s = ttl_s
        self._until: OrderedDict[BlockKey, float] = OrderedDict()

    def add(self, keys: Sequence[BlockKey], now: float) -> None:
        # The first block of a chain is refreshed last, so that chains lose their leaves first.
        for key in reversed(keys):
            self._until[key] = now + self._ttl_s
            self._until.move_to_end(key)
        while len(self._until) > self._capacity:
            self._until.popitem(last=False)

    def extend(self, keys: Sequence[BlockKey], known: int, now: float) -> int:
        """How many of ``keys`` are there, if the first ``known`` are."""
        self._expire(now)
        while known < len(keys) and keys[known] in self._until:
            known += 1
        return known

    def _expire(self, now: float) -> None:
        # Added in order of time, so the oldest expires first.
        while self._until:
            key, until = next(iter(self._until.items()))
            if until > now:
                return
            del self._until[key]
