"""How many requests may be under recovery at once, so that retries add a share of the load at most.

    enter(who, running) -> True: go on    False: lined up; ``leave`` of another calls
    leave(who, running) -> those whose turn has come

A request is under recovery from the end of a failed attempt until the next one brings a token. In
that time its prompt and its answer so far are read again, which is the work that a retry adds. At
any moment no more than ``share`` of the running requests do that, or FLOOR where few run. Nobody is
ever refused: who finds no place waits for one, first come, first served.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

# A few requests that lost their worker together go on together.
FLOOR = 4


class RecoveryBudget(Generic[K]):
    """Owner of the places and of the line before them. No I/O, no clock."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._inside: set[K] = set()
        self._line: dict[K, None] = {}

    def places(self, running: int) -> int:
        return max(FLOOR, int(self._share * running))

    def holds(self, who: K) -> bool:
        """Whether it may go on, and has a place to give back."""
        return who in self._inside

    def enter(self, who: K, running: int) -> bool:
        assert who not in self._inside
        assert who not in self._line
        if self._line or len(self._inside) >= self.places(running):
            self._line[who] = None
            return False
        self._inside.add(who)
        return True

    def leave(self, who: K, running: int) -> list[K]:
        """Gives its place, or its turn, up. Without effect for one that has neither."""
        self._inside.discard(who)
        self._line.pop(who, None)
        called = []
        while self._line and len(self._inside) < self.places(running):
            following = next(iter(self._line))
            del self._line[following]
            self._inside.add(following)
            called.append(following)
        return called
