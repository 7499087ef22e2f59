"""What is asked under load: (prompt, parameters) pairs from a seed, and their answers when calm.

    make_cases(seed, count) -> cases -answers.learn, on a calm cluster-> Answers

Half of the prompts begin with one of a few shared prefixes. Greedy, seeded, penalized, stopped,
reported (logprobs) and doubled (``n`` = 2, over HTTP) requests take turns.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB = 512
SPECIAL = 5
PREFIXES = 8


class Kind(enum.Enum):
    GREEDY = "greedy"
    SEEDED = "seeded"
    PENALIZED = "penalized"
    REPETITION = "repetition"
    STOPPED = "stopped"
    LOGPROBS = "logprobs"
    DOUBLED = "doubled"


@dataclass(frozen=True)
class Case:
    index: int
    kind: Kind
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1

    @property
    def name(self) -> str:
        return f"{self.index}-{self.kind.value}"


@dataclass(frozen=True)
class Expected:
    """One finished sequence. Over HTTP there are no token ids, only text."""

    tokens: tuple[int, ...]
    text: str
    finish: str


# By case index: one for each of its ``n`` sequences.
Answers = Mapping[int, tuple[Expected, ...]]


def make_cases(seed: int, count: int) -> list[Case]:
    rng = random.Random(f"cases-{seed}")
    prefixes = [_tokens(rng, rng.choice((32, 64, 96, 160))) for _ in range(PREFIXES)]
    return [_case(rng, index, prefixes) for index in range(count)]


def _case(rng: random.Random, index: int, prefixes: list[tuple[int, ...]]) -> Case:
    kinds = list(Kind)
    kind = kinds[index % len(kinds)]
    shared = index // len(kinds) % 2 == 0
    head = rng.choice(prefixes) if shared else _tokens(rng, rng.choice((1, 15, 48, 130, 200)))
    prompt = (*head, *_tokens(rng, rng.randrange(1, 40)))
    seeded = {"temperature": 1.0, "seed": rng.randrange(1, 2**31)}
    sampling: dict[Kind, dict[str, Any]] = {
        Kind.GREEDY: {"temperature": 0.0},
        Kind.SEEDED: {**seeded, "top_p": 0.95, "top_k": 80, "ignore_eos": True},
        Kind.PENALIZED: {**seeded, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        Kind.REPETITION: {"temperature": 0.0, "repetition_penalty": 1.3, "min_tokens": 6},
        Kind.STOPPED: {**seeded, "ignore_eos": True},
        Kind.LOGPROBS: {"temperature": 0.0, "logprobs": 2},
        Kind.DOUBLED: {**seeded, "ignore_eos": True},
    }
    n = 2 if kind is Kind.DOUBLED else 1
    return Case(index, kind, prompt, rng.choice((8, 16, 24, 40)), sampling[kind], n)


def with_stop(case: Case, calm_text: str) -> Case:
    """The same case, stopped at two letters from the middle of what it writes unstopped."""
    middle = len(calm_text) // 2
    stop = calm_text[middle : middle + 2]
    if len(stop) < 2 or "\N{REPLACEMENT CHARACTER}" in stop:
        return case
    return Case(
        case.index, case.kind, case.prompt, case.max_tokens, {**case.sampling, "stop": [stop]}
    )


def _tokens(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(SPECIAL, VOCAB) for _ in range(length))
