"""The last minutes in numbers, one sample a second, for whoever looks at the live page.

    recent.tick()            once a second; reads sums that are counted anyway
    recent.since(sequence)   the samples after that one

Bounded by HISTORY_S, whatever the load: nothing is counted per request or token.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.telemetry.totals import Buckets, Totals
from pdserve.types import Tier

INTERVAL_S = 1.0
HISTORY_S = 300
# Latencies of a sample are those of so many seconds before it, else most would have none.
LATENCY_S = 15
# Rates of the headline.
HEADLINE_S = 60


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds; None where nothing ended or was written in that time."""

    p50: float | None
    p95: float | None

    @staticmethod
    def between(then: Buckets, now: Buckets) -> Quantiles:
        return Quantiles(now.quantile_since(then, 0.5), now.quantile_since(then, 0.95))


@dataclass(frozen=True, slots=True)
class Sample:
    """One second; rates are per second, prompts count when their request ends."""

    sequence: int
    at: float  # seconds since 1970
    in_flight: int
    finished: float
    failed: float
    rejected: float
    generated: float  # tokens
    computed: float  # prompt tokens that no cache had
    device: float  # prompt tokens found in that tier
    host: float
    redis: float
    kv_bytes: float
    first_token: Quantiles
    inter_token: Quantiles
    end_to_end: Quantiles


class Recent:
    """Owner of the samples. Event loop only."""

    def __init__(
        self,
        read: Callable[[], Totals],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._read = read
        self._clock = clock
        self._wall = wall
        self._samples: deque[Sample] = deque(maxlen=HISTORY_S)
        # As long as the longest time that something is compared over.
        self._totals: deque[tuple[float, Totals]] = deque(maxlen=HEADLINE_S + 1)
        self._totals.append((clock(), read()))
        self.sequence = 0

    def tick(self) -> None:
        self.sequence += 1
        self._totals.append((self._clock(), self._read()))
        self._samples.append(self._sample(1, LATENCY_S))

    def headline(self) -> Sample:
        """Over HEADLINE_S, or since the router started."""
        return self._sample(HEADLINE_S, HEADLINE_S)

    def since(self, sequence: int) -> list[Sample]:
        """Those after ``sequence``; one that was never given means all."""
        new = self.sequence - sequence
        if not 0 <= new <= len(self._samples):
            new = len(self._samples)
        return list(itertools.islice(self._samples, len(self._samples) - new, None))

    def _sample(self, rates_over: int, latencies_over: int) -> Sample:
        """Both in ticks, as far as there are any."""
        now_at, now = self._totals[-1]
        then_at, then = self._before(rates_over)
        _, earlier = self._before(latencies_over)
        seconds = max(now_at - then_at, 1e-3)
        found = {tier: now.cached[tier] - then.cached[tier] for tier in Tier}
        return Sample(
            sequence=self.sequence,
            at=self._wall(),
            in_flight=now.in_flight,
            finished=(now.finished - then.finished) / seconds,
            failed=(now.failed - then.failed) / seconds,
            rejected=(now.rejected - then.rejected) / seconds,
            generated=(now.generated - then.generated) / seconds,
            computed=(now.prompt - then.prompt - sum(found.values())) / seconds,
            device=found[Tier.DEVICE] / seconds,
            host=found[Tier.HOST] / seconds,
            redis=found[Tier.REDIS] / seconds,
            kv_bytes=(now.kv_bytes - then.kv_bytes) / seconds,
            first_token=Quantiles.between(earlier.first_token, now.first_token),
            inter_token=Quantiles.between(earlier.inter_token, now.inter_token),
            end_to_end=Quantiles.between(earlier.end_to_end, now.end_to_end),
        )

    def _before(self, ticks: int) -> tuple[float, Totals]:
        return self._totals[max(0, len(self._totals) - 1 - ticks)]
