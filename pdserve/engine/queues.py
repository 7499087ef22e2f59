"""Sequences in the one order that scheduling knows: priority, then arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from pdserve.engine.sequence import Sequence


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order


class OrderedQueue:
    """A sorted list; orders are unique. Adding and removing shift at most a few thousand slots."""

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        """Over a copy: the queue may change meanwhile."""
        return iter(tuple(self._items))

    def add(self, seq: Sequence) -> None:
        insort(self._items, seq, key=_order)

    def remove(self, seq: Sequence) -> None:
        index = bisect_left(self._items, seq.order, key=_order)
        assert self._items[index] is seq
        del self._items[index]

    def first(self) -> Sequence | None:
        """The oldest."""
        return self._items[0] if self._items else None

    def youngest(self) -> Iterator[Sequence]:
        """From the last to the first, over a copy."""
        return iter(self._items[::-1])
