"""Copies that wait for Redis, in rows that are used again.

    free -> take -> (filled, sent) -> give_back -> free

Memory that is new for each copy costs more than the copy: the system zeroes its pages first. The
row that was given back last is taken first, so no more rows are ever touched than waited at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from cache_tiers.spans import Adopt
from pdserve.errors import TierError
from pdserve.pages import Bytes, arena


class Aside:
    """Thread-safe. Owns the rows; whoever took some gives them back. TierError without memory."""

    def __init__(
        self,
        bytes_max: int,
        span_bytes: int,
        adopt: Adopt | None = None,
    ) -> None:
        """``adopt`` prepares the memory for copies, and gives what ends that."""
        self.span_bytes = span_bytes
        rows = bytes_max // span_bytes
        try:
            self._rows = arena(rows, span_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise TierError(f"no memory for {bytes_max} bytes that wait for Redis") from error
        self._release = adopt(self._rows, False) if adopt and rows else None
        self._lock = threading.Lock()
        self._free = list(range(rows - 1, -1, -1))  # its end is used first

    def take(self, count: int) -> list[int]:
        """As many rows as are free, at most ``count``."""
        with self._lock:
            return [self._free.pop() for _ in range(min(count, len(self._free)))]

    @property
    def taken(self) -> int:
        with self._lock:
            return len(self._rows) - len(self._free)

    @property
    def scarce(self) -> bool:
        """Fewer than half of the rows are free."""
        with self._lock:
            return 2 * len(self._free) < len(self._rows)

    def row(self, row: int) -> Bytes:
        """[span_bytes], writable."""
        found: Bytes = self._rows[row]
        return found

    def give_back(self, rows: Sequence[int]) -> None:
        with self._lock:
            self._free.extend(reversed(rows))

    def close(self) -> None:
        """Nobody copies from or to a row any more."""
        if self._release is not None:
            self._release()
            self._release = None
