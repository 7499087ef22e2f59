"""The seam of every slower cache tier: contains, get, put, delete on whole block spans.

A tier stores *values* under *keys* and promises only that what ``get`` returns is, byte for byte,
what was put under that key by a writer with the same fingerprint. Everything else (a failing
server, a damaged value, an entry that expired) reads as a miss and is counted. Keys, the engine's
device index and the tiers meet in cache_tiers/manager.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.types import BlockKey, Tier


@dataclass(frozen=True, slots=True)
class TierStats:
    name: Tier
    queries: int = 0
    hits: int = 0
    stored: int = 0
    evicted: int = 0
    errors: int = 0
    rejected_values: int = 0  # damaged, foreign or outdated: deleted and read as a miss
    bytes_used: int = 0
    reachable: bool = True


class CacheTier(Protocol):
    """Thread-safe. ``into``, ``values``: whole spans. Raises TierError when it cannot work."""

    name: Tier

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]: ...

    def get(self, keys: Sequence[BlockKey], into: Sequence[memoryview], timeout: float) -> int:
        """Fills ``into`` for the longest prefix of ``keys`` that is here; returns its length.

        A buffer beyond that prefix may hold garbage.
        """
        ...

    def put(self, keys: Sequence[BlockKey], values: Sequence[memoryview]) -> None: ...

    def delete(self, keys: Sequence[BlockKey]) -> None: ...

    def clear(self) -> None: ...

    def stats(self) -> TierStats: ...

    def close(self) -> None: ...
