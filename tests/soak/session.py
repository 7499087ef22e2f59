"""Before the first phase: answers learned, every pair of workers met, baseline taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.e2e.clusters import Running
from tests.e2e.oracle import Oracle
from tests.soak import leftovers
from tests.soak.answers import learn
from tests.soak.cases import Case
from tests.soak.load import Load
from tests.soak.phases import Soak
from tests.soak.streams import Fronts

WARM_STREAMS = 32
WARM_REQUESTS = 64


@asynccontextmanager
async def begin(
    running: Running, oracle: Oracle, cases: list[Case], seed: int
) -> AsyncIterator[tuple[Soak, int]]:
    """A soak whose phases can start, and how many of its answers transformers confirmed."""
    async with Fronts(running.caller.address, running.http) as fronts:
        learned, answers, confirmed = await learn(fronts, cases, oracle)
        warm = Load(fronts, learned, answers, f"{seed}-warm")
        outcomes = await warm.steady(WARM_STREAMS, lambda begun: begun >= WARM_REQUESTS)
        wrong = [o.wrong for o in outcomes if o.wrong]
        assert not wrong, wrong
        await asyncio.to_thread(running.settle)
        baseline = leftovers.measure(running)
        yield Soak(running, fronts, learned, answers, baseline, seed), confirmed
