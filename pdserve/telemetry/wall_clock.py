"""What time it was, for moments of time.monotonic().

The two clocks run alike until somebody sets the wall's, or the machine sleeps, in which the other
stands still. Small differences are the error of looking; a larger one is followed, so that a
process that lives long tells the same time as one that just began.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LOOK_EVERY_S = 1.0
STEP_NS = 5_000_000
_LOOKS = 8


class WallClock:
    """May be used by any thread: who looks at the same time as another one finds the same."""

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall_ns = wall_ns
        self._monotonic_ns = monotonic_ns
        self._offset_ns, _ = self._look()
        self._looked_ns = monotonic_ns()

    def unix_ns(self, moment: float) -> int:
        """``moment``: seconds of time.monotonic(). Nanoseconds since 1970."""
        now = self._monotonic_ns()
        if now - self._looked_ns >= LOOK_EVERY_S * 1e9:
            self._looked_ns = now
            offset, error = self._look()
            if abs(offset - self._offset_ns) > STEP_NS + error:
                self._offset_ns = offset
        return int(moment * 1e9) + self._offset_ns

    def _look(self) -> tuple[int, int]:
        """The offset, from the closest pair of readings among a few, and how far they lay apart."""
        pairs = []
        for _ in range(_LOOKS):
            before = self._monotonic_ns()
            wall = self._wall_ns()
            after = self._monotonic_ns()
            pairs.append((after - before, wall - (before + after) // 2))
        error, offset = min(pairs)
        return offset, error
