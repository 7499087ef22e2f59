"""The router over workers that answer at once, beside sglang-router over an equal HTTP stub.

Held: streams of a fixed pace, all open at once. Relayed: streams of workers that wait for nothing,
so that the router (or, with fewer cores than processes, the machine) is the limit; the CPU that the
router itself took per token says what it would reach with a core of its own. The client reads bare
bytes. sglang-router passes an HTTP body on as it is; ours takes tokens from a gRPC stream,
detokenizes, checks stop conditions and writes the events itself.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from bench.environments import environment
from bench.record import REPEATS, Goal, Record, interleaved
from bench.routers import Relayed, Router, load, our_router, sglang_router

HELD = 1000
HELD_STEP_S = 0.25
HELD_TOKENS = 40
STREAMS, TOKENS = 100, 100
PACED = (1, 10, 100, 1000)


def run() -> Record:
    record = Record("router_alone")
    peer = environment("sglang-router", "sglang-router")
    _hold(record, peer)
    with our_router(0.0) as ours, sglang_router(peer, 0.0) as theirs:
        cpu: dict[str, list[float]] = {"ours": [], "sglang": []}
        found = interleaved(
            {
                "ours": lambda: _relay(ours, cpu["ours"]),
                "sglang": lambda: _relay(theirs, cpu["sglang"]),
            },
            REPEATS,
        )
    record.value("tokens relayed, ours", "tokens/s", found["ours"])
    record.value("tokens relayed, sglang-router", "tokens/s", found["sglang"])
    record.ratio("tokens relayed / sglang-router", found["ours"], found["sglang"])
    for name, spent in cpu.items():
        record.value(f"CPU of the router per token, {name}", "us", spent[1:])
    return record


def _hold(record: Record, peer: Path) -> None:
    with our_router(HELD_STEP_S) as ours:
        paced = {count: asyncio.run(load(ours, count, HELD_TOKENS)) for count in PACED}
    with sglang_router(peer, HELD_STEP_S) as theirs:
        other = asyncio.run(load(theirs, HELD, HELD_TOKENS))
    held = paced[HELD]
    record.value("streams held at once, ours", "", [held.at_once - held.failed], Goal(HELD))
    record.value("streams held at once, sglang-router", "", [other.at_once - other.failed])
    record.notes["router CPU against streams"] = {
        "streams": list(paced),
        "cpu_s_per_s": [one.router_cpu_s / one.seconds for one in paced.values()],
        "tokens_per_s": [one.tokens / one.seconds for one in paced.values()],
    }


def _relay(router: Router, cpu: list[float]) -> float:
    """Tokens/s; appends the router's microseconds per token."""
    relayed: Relayed = asyncio.run(load(router, STREAMS, TOKENS))
    assert not relayed.failed, f"{relayed.failed} streams failed"
    cpu.append(1e6 * relayed.router_cpu_s / relayed.tokens)
    return relayed.tokens / relayed.seconds
