"""Long prompts arriving while streams run: 1 prefill + 1 decode worker beside one mixed worker.

Both clusters stand on the same cores and are asked in turns. Under load: how even the streams stay
(p99 between tokens) and how long the long prompts wait. At low load, one request at a time: what
separation costs there, with the rule that skips hand-offs and without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.live import Live, in_background, one_ray, prompt_ids, running_cluster, stream
from bench.record import Record
from pdserve.bench.stats import percentile
from pdserve.client.aio import AsyncClient

REPEATS = 5
STREAMS, STREAM_TOKENS, STREAM_PROMPT = 4, 96, 128
LONG_PROMPTS, LONG_PROMPT, EVERY_S = 2, 1024, 1.0
LOW_PROMPTS = (32, 256)
LOW_TOKENS = 8
_POOL = "engine.pool_blocks=1200"


@dataclass(slots=True)
class Loaded:
    """Milliseconds: p50 and p99 between tokens of the streams, mean TTFT of the long prompts."""

    p50: float
    p99: float
    ttft: float


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    live: Live


def run() -> Record:
    record = Record("mixed_load")
    with contextlib.ExitStack() as stack:
        ray = stack.enter_context(one_ray())
        split = stack.enter_context(running_cluster(_POOL, ray=ray, prefill=1, decode=1))
        mixed = stack.enter_context(running_cluster(_POOL, ray=ray, prefill=0, decode=0, mixed=1))
        asyncio.run(_measure(record, (Case("1+1", split), Case("mixed", mixed))))
    return record


async def _measure(record: Record, cases: Sequence[Case]) -> None:
    rng = np.random.default_rng(record.seed)
    loaded: dict[str, list[Loaded]] = {case.name: [] for case in cases}
    low: dict[str, dict[int, list[float]]] = {
        case.name: {prompt: [] for prompt in LOW_PROMPTS} for case in cases
    }
    for turn in range(1 + REPEATS):
        print(f"turn {turn} of {REPEATS}", flush=True)
        for case in cases:
            async with AsyncClient(case.live.grpc) as client:
                under_load = await _under_load(client, rng)
                alone = {prompt: await _alone(client, prompt, rng) for prompt in LOW_PROMPTS}
            if turn:
                loaded[case.name].append(under_load)
                for prompt, end in alone.items():
                    low[case.name][prompt].append(end)
    for name in ("p50", "p99", "ttft"):
        both = [[getattr(one, name) for one in loaded[case.name]] for case in cases]
        what = "TTFT of long prompts" if name == "ttft" else f"{name} between tokens"
        for case, values in zip(cases, both, strict=True):
            record.value(f"under load, {what}, {case.name}", "ms", values)
        record.ratio(f"under load, {what}: 1+1 / mixed", both[0], both[1])
    for prompt in LOW_PROMPTS:
        ours, mixed = (low[case.name][prompt] for case in cases)
        record.value(f"alone, {prompt} tokens in, {LOW_TOKENS} out, 1+1", "ms", ours)
        record.value(f"alone, {prompt} tokens in, {LOW_TOKENS} out, mixed", "ms", mixed)
        record.ratio(f"alone, {prompt} tokens in: 1+1 / mixed", ours, mixed)


async def _under_load(client: AsyncClient, rng: np.random.Generator) -> Loaded:
    streams = await in_background(client, STREAMS, STREAM_PROMPT, STREAM_TOKENS, rng)
    long = []
    for _ in range(LONG_PROMPTS):
        long.append(asyncio.create_task(stream(client, prompt_ids(LONG_PROMPT, rng), 2)))
        await asyncio.sleep(EVERY_S)
    waited = [1e3 * (await one).ttft_s for one in long]
    gaps = [1e3 * gap for one in streams for gap in (await one).gaps_s]
    return Loaded(percentile(gaps, 50), percentile(gaps, 99), statistics.fmean(waited))


async def _alone(client: AsyncClient, prompt: int, rng: np.random.Generator) -> float:
    """Milliseconds from end to end, the mean of a few requests one after another."""
    ends = [
        (await stream(client, prompt_ids(prompt, rng), LOW_TOKENS)).token_s[-1] for _ in range(3)
    ]
    return 1e3 * statistics.fmean(ends)
