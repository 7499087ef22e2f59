"""What is asked, and when: requests with lengths, prefixes and due times. Pure.

A workload comes from numbers (lengths and a rate) or from a trace; either is the same in each
repeat, but for the prompts' tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Request:
    """One request. ``blocks`` name the parts of its prompt: equal names mean equal tokens."""

    due_s: float  # from the start of the run
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # empty: shares nothing
    block_tokens: int = 0


def poisson_arrivals(count: int, rate: float, seed: int) -> tuple[float, ...]:
    """Due times in seconds, the first at 0. ``rate`` in requests/s; infinite: all at once."""
    if not rate > 0:
        raise ConfigError(f"--rate {rate:g}: expected more than 0 requests a second")
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, max(count - 1, 0))
    return (0.0, *np.cumsum(gaps).tolist())[:count]


def uniform(count: int, rate: float, prompt: int, output: int, seed: int) -> tuple[Request, ...]:
    """Requests of one size that share nothing, as Poisson arrivals."""
    return tuple(Request(due, prompt, output) for due in poisson_arrivals(count, rate, seed))


def at_rate(requests: Sequence[Request], rate: float, seed: int) -> tuple[Request, ...]:
    """The same requests in the same order, due as Poisson arrivals."""
    dues = poisson_arrivals(len(requests), rate, seed)
    return tuple(
        dataclasses.replace(request, due_s=due) for request, due in zip(requests, dues, strict=True)
    )


def at_speed(requests: Sequence[Request], speed: float) -> tuple[Request, ...]:
    """A trace's own gaps, ``speed`` times shorter; the first request is due at 0."""
    if not 0 < speed < float("inf"):
        raise ConfigError(f"--speed {speed:g}: expected a number above 0")
    start = min((request.due_s for request in requests), default=0.0)
    return tuple(
        dataclasses.replace(request, due_s=(request.due_s - start) / speed) for request in requests
    )


def scaled(requests: Sequence[Request], scale: float) -> tuple[Request, ...]:
    """Prompts and answers ``scale`` times as long, at least one token each.

    Blocks shrink by the same factor, so the share of a prompt that others have too stays as it is.
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale {scale:g}: expected more than 0 and at most 1")
    return tuple(_scaled(request, scale) for request in requests)


def _scaled(request: Request, scale: float) -> Request:
    output = _length(request.output_tokens, scale)
    if not request.blocks:
        return dataclasses.replace(
            request, prompt_tokens=_length(request.prompt_tokens, scale), output_tokens=output
        )
    block = _length(request.block_tokens, scale)
    full = len(request.blocks) - 1
    rest = request.prompt_tokens - full * request.block_tokens
    return dataclasses.replace(
        request,
        prompt_tokens=full * block + min(block, _length(rest, scale)),
        output_tokens=output,
        block_tokens=block,
    )


def _length(tokens: int, scale: float) -> int:
    return max(1, round(tokens * scale))
