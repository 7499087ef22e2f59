"""How long one read of a prefix spent in each tier, for its request's timeline.

A read may go back and forth between tiers; each has one phase, from its first turn to its last.
"""

from __future__ import annotations

import time

from pdserve.telemetry.timeline import Phase, PhaseName, between
from pdserve.types import Tier


class ReadTimes:
    """Of one read, on its thread."""

    def __init__(self, span_bytes: int) -> None:
        self._span_bytes = span_bytes
        # tier -> beginning and end in seconds of time.monotonic(), blocks that it gave
        self._turns: dict[Tier, tuple[float, float, int]] = {}

    def took(self, tier: Tier, began: float, blocks: int) -> None:
        """From ``began`` until now."""
        first, _, before = self._turns.get(tier, (began, began, 0))
        self._turns[tier] = (first, time.monotonic(), before + blocks)

    def phases(self) -> tuple[Phase, ...]:
        return tuple(
            between(
                PhaseName.TIER_READ,
                began,
                ended,
                tier=tier,
                blocks=blocks,
                bytes=blocks * self._span_bytes,
            )
            for tier, (began, ended, blocks) in self._turns.items()
        )
