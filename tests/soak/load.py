"""Keeps a number of requests in flight, or sends them in bursts, and collects how each ended."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.soak.cases import Answers, Case
from tests.soak.streams import Cancel, Fronts, Outcome

# One salt in so many requests: within it prefixes are found in caches, beyond it none is.
SALT_EVERY = 100
COLD_SHARE = 0.3
CANCEL_AFTER_S = 4.0


@dataclass
class Load:
    """Owns the draw of the next request. One event loop."""

    fronts: Fronts
    cases: list[Case]
    answers: Answers
    seed: str
    _count: int = 0
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    async def one(self, cancel: Cancel | None = None) -> Outcome:
        self._count += 1
        case = self._rng.choice(self.cases)
        salt = f"{self.seed}-{self._count // SALT_EVERY}"
        if self._rng.random() < COLD_SHARE:
            salt = f"{self.seed}-alone-{self._count}"
        outcome = await self.fronts.ask(case, salt, cancel)
        outcome.judge(self.answers[case.index])
        return outcome

    async def steady(self, streams: int, enough: Callable[[int], bool]) -> list[Outcome]:
        """``streams`` at any time, until ``enough`` of the number that were begun."""
        outcomes: list[Outcome] = []
        begun = itertools.count()

        async def client() -> None:
            while not enough(next(begun)):
                outcomes.append(await self.one())

        await asyncio.gather(*(client() for _ in range(streams)))
        return outcomes

    async def storm(self, total: int, burst: int) -> list[Outcome]:
        """Bursts; half of each hangs up somewhere on its way."""
        outcomes: list[Outcome] = []
        for start in range(0, total, burst):
            plans = [self._plan() for _ in range(min(burst, total - start))]
            outcomes += await asyncio.gather(*(self.one(plan) for plan in plans))
        return outcomes

    def _plan(self) -> Cancel | None:
        if self._rng.random() < 0.5:
            return None
        # Squared: the early phases (queued, reading, moving) are short.
        seconds = CANCEL_AFTER_S * self._rng.random() ** 2
        return Cancel(seconds, self._rng.choice((1, 2, 5, 12, 1000)))
