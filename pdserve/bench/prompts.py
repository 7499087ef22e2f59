"""Token ids for a request: random, equal where two requests name the same block. Pure.

Another repeat has other tokens, so that no cache answers from the repeat before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pdserve.bench.workload import Request
from pdserve.errors import ConfigError

# Streams of random numbers that never meet: of blocks, and of requests that share nothing.
_OF_BLOCK, _OF_REQUEST = 0, 1


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Ids from ``low`` up to, not including, ``high``."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> TokenRange:
        """From ``LOW:HIGH``. ConfigError."""
        low, _, high = text.partition(":")
        if not (low.isdecimal() and high.isdecimal() and int(low) < int(high) < 2**31):
            raise ConfigError(f"--prompt-ids {text!r}: expected LOW:HIGH with LOW below HIGH")
        return cls(int(low), int(high))


def token_ids(request: Request, index: int, ids: TokenRange, seed: int, repeat: int) -> list[int]:
    """``request.prompt_tokens`` ids of the request at ``index`` of the workload."""
    if not request.blocks:
        return _draw((seed, repeat, _OF_REQUEST, index), ids, request.prompt_tokens)
    tokens: list[int] = []
    for block in request.blocks:
        tokens += _draw((seed, repeat, _OF_BLOCK, block), ids, request.block_tokens)
    return tokens[: request.prompt_tokens]


def _draw(key: tuple[int, ...], ids: TokenRange, count: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(key).integers(ids.low, ids.high, count).tolist()
    return drawn
