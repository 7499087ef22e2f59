"""What the way client -> router -> prefill -> hand-off -> decode -> client adds to the bare engine.

One cluster of 1 prefill and 1 decode worker and one bare engine stand side by side and are asked in
turns, with prompts that no cache holds. Three figures, each a difference of means: time to first
token when idle; the same while 8 streams run; time per token of one stream. Whatever separation
costs on shared cores is in them: with 8 streams running two engines compete for the cores.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
from collections.abc import Sequence

import numpy as np

from bench.bare_engine import BareEngine, bare_engine
from bench.live import Live, in_background, prompt_ids, running_cluster, settings, stream
from bench.record import Goal, Record
from pdserve.client.aio import AsyncClient

PROMPT = 256
STREAMS = 8
REPEATS = 5
FIRST_TOKENS = 3  # asked for, one after another, in each repeat
WRITTEN = 33  # tokens of the stream whose rate is measured
_LONG = 400  # tokens of the streams that run beside


class _Ours:
    def __init__(self, live: Live, client: AsyncClient, rng: np.random.Generator) -> None:
        self._live, self._client, self._rng = live, client, rng

    async def ttft(self) -> float:
        prompt = prompt_ids(PROMPT, self._rng)
        return (await stream(self._client, prompt, 1 + 1)).ttft_s

    async def gaps(self) -> Sequence[float]:
        return (await stream(self._client, prompt_ids(PROMPT, self._rng), WRITTEN)).gaps_s

    async def loaded_ttfts(self) -> list[float]:
        beside = await in_background(self._client, STREAMS, PROMPT, _LONG, self._rng)
        found = [await self.ttft() for _ in range(FIRST_TOKENS)]
        assert not any(task.done() for task in beside), "the streams beside ended too early"
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        return found


class _Bare:
    def __init__(self, engine: BareEngine, rng: np.random.Generator) -> None:
        self._engine, self._rng = engine, rng

    def ttft(self) -> float:
        return self._engine.stream(prompt_ids(PROMPT, self._rng), 1 + 1)[0]

    def gaps(self) -> Sequence[float]:
        times = self._engine.stream(prompt_ids(PROMPT, self._rng), WRITTEN)
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def loaded_ttfts(self) -> list[float]:
        beside = [self._engine.submit(prompt_ids(PROMPT, self._rng), _LONG) for _ in range(STREAMS)]
        for running in beside:
            running.first.wait(60)
        found = [self.ttft() for _ in range(FIRST_TOKENS)]
        assert not any(running.ended.is_set() for running in beside), "the streams ended too early"
        for running in beside:
            self._engine.cancel(running)
        return found


def run() -> Record:
    record = Record("added")
    rng = np.random.default_rng(record.seed)
    with running_cluster("router.skip_handoff_tokens=0", prefill=1, decode=1) as live:
        # Ray starts workers with a niceness of their own: others at work must slow both alike.
        niceness = os.getpriority(os.PRIO_PROCESS, live.cluster.workers()[0].pid)
        with bare_engine(settings(), niceness) as engine:
            asyncio.run(_measure(record, live, _Bare(engine, rng), rng))
    return record


async def _measure(record: Record, live: Live, bare: _Bare, rng: np.random.Generator) -> None:
    async with AsyncClient(live.grpc) as client:
        ours = _Ours(live, client, rng)
        found: dict[str, list[list[float]]] = {}
        for turn in range(1 + REPEATS):
            print(f"turn {turn} of {REPEATS}", flush=True)
            took = {
                "ttft ours": [await ours.ttft() for _ in range(FIRST_TOKENS)],
                "ttft bare": [bare.ttft() for _ in range(FIRST_TOKENS)],
                "gap ours": list(await ours.gaps()),
                "gap bare": list(bare.gaps()),
                "loaded ours": await ours.loaded_ttfts(),
                "loaded bare": bare.loaded_ttfts(),
            }
            if turn:
                for name, seconds in took.items():
                    found.setdefault(name, []).append([1e3 * second for second in seconds])
    for name, repeats in found.items():
        record.value(name, "ms", [statistics.fmean(repeat) for repeat in repeats])
    record.notes["ms"] = found
    for name, what, goal in (
        ("ttft", "added to TTFT, idle", 15.0),
        ("loaded", f"added to TTFT with {STREAMS} streams running", 25.0),
        ("gap", "added per token", 1.0),
    ):
        pairs = zip(found[f"{name} ours"], found[f"{name} bare"], strict=True)
        added = [statistics.fmean(a) - statistics.fmean(b) for a, b in pairs]
        record.value(what, "ms", added, Goal(goal, at_least=False))
