"""How costs grow: curves on log axes with the slope of each, not points.

Decode step against batch and against context, and prefill step against context (bare engine); the
router's prefix index, time and memory, against cached blocks. The router's CPU against streams and
hand-off time against tokens come from ``router_alone`` and ``handoff``.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench.bare_engine import BareEngine, Running, bare_engine
from bench.live import prompt_ids, settings
from bench.record import Record
from cache_tiers.prefix_index import PrefixIndex
from pdserve.types import BlockKey, WorkerId

BATCHES = (1, 2, 4, 8, 16, 32, 64)
BATCH_CONTEXT = 128
CONTEXTS = (64, 256, 1024, 2048, 4096)
CONTEXT_BATCH = 4
STEPS = 12
INDEX_BLOCKS = (1_000, 10_000, 100_000, 1_000_000)
_LOOKUP_BLOCKS = 128  # a prompt of 2,048 tokens
_STORED_AT_ONCE = 16


def run() -> Record:
    record = Record("growth")
    rng = np.random.default_rng(record.seed)
    _index(record)
    with bare_engine(settings("engine.pool_blocks=1400", "engine.prefill_chunk=512")) as engine:
        _decode(engine, 2, BATCH_CONTEXT, rng)
        batch = [_decode(engine, count, BATCH_CONTEXT, rng) for count in BATCHES]
        context = [_decode(engine, CONTEXT_BATCH, length, rng) for length in CONTEXTS]
        prefill = [_prefill(engine, length, rng) for length in CONTEXTS]
    _curve(record, f"decode step, contexts of {BATCH_CONTEXT}", "sequences", BATCHES, batch)
    _curve(record, f"decode step, {CONTEXT_BATCH} sequences", "tokens", CONTEXTS, context)
    _curve(record, "prefill of one prompt", "tokens", CONTEXTS, prefill)
    return record


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line through the logarithms: y grows like x to this power."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _curve(
    record: Record, name: str, axis: str, x: Sequence[float], seconds: Sequence[float]
) -> None:
    record.notes[name] = {"axis": axis, "x": list(x), "seconds": list(seconds)}
    record.value(f"{name}: slope against {axis}", "", [slope(x, seconds)])
    record.value(f"{name}: slope over the last two", "", [slope(x[-2:], seconds[-2:])])


def _decode(engine: BareEngine, count: int, context: int, rng: np.random.Generator) -> float:
    """Median seconds of a step while all ``count`` sequences run."""
    running = [engine.submit(prompt_ids(context, rng), STEPS * 40) for _ in range(count)]
    for one in running:
        one.first.wait(120)
    last = running[-1]
    while len(last.token_s) < STEPS:
        time.sleep(0.005)
    found = _gaps(last)
    for one in running:
        engine.cancel(one)
    return statistics.median(found)


def _gaps(running: Running) -> list[float]:
    return [later - earlier for earlier, later in pairwise(running.token_s)]


def _prefill(engine: BareEngine, length: int, rng: np.random.Generator) -> float:
    return engine.stream(prompt_ids(length, rng), 1)[0]


def _index(record: Record) -> None:
    """Fills one index and looks at it on the way."""
    index, worker = PrefixIndex(), WorkerId("d0")
    before, filled = _resident_bytes(), 0
    store, lookup, memory = [], [], []
    prompt = [BlockKey(os.urandom(16)) for _ in range(_LOOKUP_BLOCKS)]
    index.stored(worker, prompt)
    for blocks in INDEX_BLOCKS:
        chains = [
            [BlockKey(os.urandom(16)) for _ in range(_STORED_AT_ONCE)]
            for _ in range((blocks - filled) // _STORED_AT_ONCE)
        ]
        began = time.perf_counter()
        for chain in chains:
            index.stored(worker, chain)
        store.append((time.perf_counter() - began) / (blocks - filled))
        filled = blocks
        del chains
        memory.append(float(_resident_bytes() - before))
        lookup.append(_lookup_s(index, prompt))
    assert index.keys >= INDEX_BLOCKS[-1]
    _curve(record, "prefix index, storing a block", "blocks", INDEX_BLOCKS, store)
    _curve(record, "prefix index, looking up 2,048 tokens", "blocks", INDEX_BLOCKS, lookup)
    record.notes["prefix index memory"] = {"axis": "blocks", "x": INDEX_BLOCKS, "bytes": memory}
    record.value("prefix index, memory of a block at a million", "B", [memory[-1] / filled])


def _lookup_s(index: PrefixIndex, prompt: Sequence[BlockKey]) -> float:
    times = []
    for _ in range(200):
        began = time.perf_counter()
        found = index.longest_all(prompt)
        times.append(time.perf_counter() - began)
        assert list(found.values()) == [_LOOKUP_BLOCKS]
    return statistics.median(times)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
