"""Long prompts arriving while streams run: 1 prefill + 1 decode worker, one mixed worker, vLLM.

All three serve over HTTP on the same cores and are asked in turns. Under load: how even the streams
stay (p99 between tokens) and how long the long prompts wait. At low load, one request at a time:
what separation costs there, after the rule that skips hand-offs of short prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
from dataclasses import dataclass

import numpy as np

from bench.live import prompt_ids
from bench.record import REPEATS, Record
from bench.served import POOLS, burst, served
from pdserve.bench.caller import Target
from pdserve.bench.stats import percentile

STREAMS, STREAM_TOKENS, STREAM_PROMPT = 4, 256, 128
LONG_PROMPTS, LONG_PROMPT, EVERY_S = 2, 1024, 1.0
# Until the long prompts come: every stream has written its first token by then.
SETTLE_S = 3.0
LOW_PROMPTS = (32, 256)
LOW_TOKENS, LOW_REQUESTS = 8, 3
CONTENDERS = (*POOLS, "vllm")
OURS = "pdserve 1+1"


@dataclass(frozen=True, slots=True)
class Found:
    """Milliseconds of one turn."""

    p50: float  # between tokens of the streams, while the long prompts are there
    p99: float
    ttft: float  # mean of the long prompts
    alone: tuple[float, ...]  # from end to end, for each of LOW_PROMPTS


def run() -> Record:
    record = Record("mixed_load", seed=int.from_bytes(os.urandom(3), "big"))
    rng = np.random.default_rng(record.seed)
    found: dict[str, list[Found]] = {name: [] for name in CONTENDERS}
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(served(name)) for name in CONTENDERS}
        for turn in range(1 + REPEATS):
            print(f"turn {turn} of {REPEATS}", flush=True)
            for name, server in running.items():
                with server.turn():
                    one = asyncio.run(_turn(server.target, rng))
                if turn:
                    found[name].append(one)
    for part, what in (
        ("p50", "under load, p50 between tokens"),
        ("p99", "under load, p99 between tokens"),
        ("ttft", f"under load, TTFT of {LONG_PROMPT} tokens"),
    ):
        _tell(record, what, {n: [getattr(one, part) for one in found[n]] for n in CONTENDERS})
    for index, prompt in enumerate(LOW_PROMPTS):
        what = f"alone, {prompt} tokens in, {LOW_TOKENS} out"
        _tell(record, what, {n: [one.alone[index] for one in found[n]] for n in CONTENDERS})
    return record


def _tell(record: Record, what: str, repeats: dict[str, list[float]]) -> None:
    for name, values in repeats.items():
        record.value(f"{what}: {name}", "ms", values)
    for name in CONTENDERS:
        if name != OURS:
            record.ratio(f"{what}: {OURS} / {name}", repeats[OURS], repeats[name])


async def _turn(target: Target, rng: np.random.Generator) -> Found:
    prompts = [prompt_ids(STREAM_PROMPT, rng) for _ in range(STREAMS)]
    streams = asyncio.create_task(burst(target, prompts, STREAM_TOKENS))
    await asyncio.sleep(SETTLE_S)
    long = []
    for _ in range(LONG_PROMPTS):
        long.append(asyncio.create_task(burst(target, [prompt_ids(LONG_PROMPT, rng)], 2)))
        await asyncio.sleep(EVERY_S)
    waited = [1e3 * (await one)[0].ttft_s for one in long]
    gaps = []
    for sample in await streams:
        assert sample.ttft_s < SETTLE_S, f"{target.url}: a stream began after {sample.ttft_s:.2f} s"
        assert sample.end_s > SETTLE_S + EVERY_S, f"{target.url}: the streams ended too early"
        times = zip(sample.token_s[1:], sample.gaps_s, strict=True)
        gaps += [1e3 * gap for at, gap in times if at > SETTLE_S]
    alone = tuple([await _alone(target, length, rng) for length in LOW_PROMPTS])
    return Found(percentile(gaps, 50), percentile(gaps, 99), statistics.fmean(waited), alone)


async def _alone(target: Target, length: int, rng: np.random.Generator) -> float:
    """Milliseconds from end to end, the mean of a few requests one after another."""
    ends = []
    for _ in range(LOW_REQUESTS):
        (sample,) = await burst(target, [prompt_ids(length, rng)], LOW_TOKENS)
        ends.append(sample.end_s)
    return 1e3 * statistics.fmean(ends)
