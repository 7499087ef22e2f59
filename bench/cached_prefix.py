"""Time to first token with a cached prefix, from each tier, beside computing it again.

Each turn asks four times for the same 2,048 tokens and a few new ones: with every tier empty, then
from device memory, then with that emptied from the host tier, then with both emptied from Redis.
Each answer says where its prefix came from; one that came from elsewhere fails the measurement.
"""

from __future__ import annotations

import asyncio

import numpy as np

from bench.live import Live, Timed, prompt_ids, running_cluster, stream
from bench.record import REPEATS, Goal, Record
from pdserve.client.aio import AsyncClient
from pdserve.types import CachedTokens

PREFIX = 2048
SUFFIX = 16
_SETTLE_S = 1.5  # until write-backs have arrived in every tier
_GOALS = {"device": 10.0, "host": 8.0, "redis": 4.0}


def run() -> Record:
    record = Record("cached_prefix")
    with running_cluster("engine.pool_blocks=1500", prefill=1, decode=1) as live:
        asyncio.run(_measure(record, live))
    return record


async def _measure(record: Record, live: Live) -> None:
    rng = np.random.default_rng(record.seed)
    found: dict[str, list[float]] = {name: [] for name in ("recompute", *_GOALS)}
    async with AsyncClient(live.grpc) as client:
        for turn in range(1 + REPEATS):
            print(f"turn {turn} of {REPEATS}", flush=True)
            prefix = prompt_ids(PREFIX, rng)
            for name, times in found.items():
                _empty(live, name)
                asked = await stream(client, [*prefix, *prompt_ids(SUFFIX, rng)], 2)
                _check(asked, name)
                if turn:
                    times.append(1e3 * asked.ttft_s)
                await asyncio.sleep(_SETTLE_S)
    for name, times in found.items():
        record.value(f"TTFT, {name}", "ms", times)
    for name, goal in _GOALS.items():
        record.ratio(f"recompute / {name}", found["recompute"], found[name], Goal(goal))


def _empty(live: Live, name: str) -> None:
    """All tiers above the one that is to answer."""
    above = {"recompute": ("device", "host", "redis"), "host": ("device",)}
    above["redis"] = ("device", "host")
    if name in above:
        live.flush(*above[name])


def _check(asked: Timed, name: str) -> None:
    assert asked.last.usage is not None
    cached: CachedTokens = asked.last.usage.cached_tokens
    if name == "recompute":
        assert cached.total == 0, f"nothing should be cached: {cached}"
    else:
        assert getattr(cached, name) >= PREFIX - SUFFIX, f"expected all from {name}: {cached}"
