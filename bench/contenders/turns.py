"""What the engines that are compared have in common: a turn, and how one process takes turns.

A process is started for each engine and keeps its model. It reads a turn as a line of JSON, lets
``streams`` prompts of random tokens be answered with ``tokens`` tokens each, and writes what it saw
as a line. Only the standard library: this runs in every engine's own environment.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

LOWEST_TOKEN, HIGHEST_TOKEN = 100, 49_000


@dataclass(frozen=True)
class Turn:
    streams: int
    prompt: int  # tokens of each
    tokens: int  # to answer with, at least one
    seed: int

    def prompts(self) -> list[list[int]]:
        draw = random.Random(self.seed)
        return [
            [draw.randint(LOWEST_TOKEN, HIGHEST_TOKEN) for _ in range(self.prompt)]
            for _ in range(self.streams)
        ]


@dataclass(frozen=True)
class Seen:
    """Prefill: until every stream has its first token. Decode: from then until the first ends."""

    prefill_s: float
    decode_s: float
    decoded: int  # tokens of all streams in that time


def seen(began: float, token_times: Sequence[Sequence[float]]) -> Seen:
    """``token_times``: when each token of each stream came, on the clock of ``began``."""
    start = max(times[0] for times in token_times)
    end = min(times[-1] for times in token_times)
    decoded = sum(1 for times in token_times for at in times if start < at <= end)
    return Seen(start - began, end - start, decoded)


def take_turns(answer: Callable[[Turn], Seen], about: dict[str, str]) -> None:
    """Says ``about`` once ready, then answers turns until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(answer(Turn(**json.loads(line))))), file=out, flush=True)
