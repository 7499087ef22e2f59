"""From the command to the first token, with warm caches: ``pdserve up`` beside vLLM's server."""

from __future__ import annotations

from collections.abc import Callable

from bench.record import Goal, Record, interleaved
from bench.served import served

OURS = "pdserve 1+1"


def run() -> Record:
    record = Record("startup")
    found = interleaved({name: _start(name) for name in (OURS, "vllm")})
    for name, seconds in found.items():
        record.value(f"command to first token: {name}", "s", seconds)
    # Of times: the peer's over ours.
    record.ratio("command to first token: vllm / pdserve", found["vllm"], found[OURS], Goal(5.0))
    return record


def _start(name: str) -> Callable[[], float]:
    def start() -> float:
        with served(name) as server:
            return server.seconds

    return start
