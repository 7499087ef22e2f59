"""Keeps suspect blocks from coming back while they are on their way out of every tier.

    begin(keys) -> fenced: reads stop before them -> end(keys), once no tier holds them

A read that was under way when ``begin`` came may have the old bytes in hand; it learns of it when
it leaves, and takes back what it did. A key can be fenced by several forgets at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pdserve.types import BlockKey


@dataclass(eq=False, slots=True)
class ReadPass:
    """One read under way. ``usable``: how many of its keys, from the first, were not fenced."""

    keys: frozenset[BlockKey]
    usable: int
    forgotten: set[BlockKey] = field(default_factory=set)


class ForgetFence:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fenced: dict[BlockKey, int] = {}  # how many forgets are not done
        self._reads: set[ReadPass] = set()

    def begin(self, keys: Iterable[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                self._fenced[key] = self._fenced.get(key, 0) + 1
                for read in self._reads:
                    if key in read.keys:
                        read.forgotten.add(key)

    def end(self, keys: Iterable[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                left = self._fenced.get(key, 0) - 1
                if left > 0:
                    self._fenced[key] = left
                else:
                    self._fenced.pop(key, None)

    def is_fenced(self, key: BlockKey) -> bool:
        with self._lock:
            return key in self._fenced

    def enter(self, keys: Sequence[BlockKey]) -> ReadPass:
        with self._lock:
            usable = len(keys)
            if self._fenced:
                usable = next((i for i, key in enumerate(keys) if key in self._fenced), usable)
            read = ReadPass(frozenset(keys[:usable]), usable)
            self._reads.add(read)
            return read

    def leave(self, read: ReadPass) -> set[BlockKey]:
        """Which of its keys were forgotten since ``enter``."""
        with self._lock:
            self._reads.discard(read)
            return read.forgotten
