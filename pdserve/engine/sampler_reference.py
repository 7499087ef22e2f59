"""Sampling of one row, written out in plain Python: what sampler.py must agree with.

Shares with the fast path only the random number. Slow on purpose; tests compare the two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from pdserve.engine.randomness import uniforms
from pdserve.engine.sampler_state import GREEDY_BELOW
from pdserve.types import Sampling


def sample_reference(
    logits: Sequence[float], sampling: Sampling, token_ids: Sequence[int], prompt_len: int
) -> int:
    """The token that follows ``token_ids`` (prompt, then generated) under one row of logits [V]."""
    generated = token_ids[prompt_len:]
    scores = adjusted_reference(logits, sampling, token_ids, prompt_len)
    if sampling.temperature < GREEDY_BELOW:
        return min(range(len(scores)), key=lambda token_id: (-scores[token_id], token_id))
    weights = weights_reference(scores, sampling)
    target = float(uniforms([sampling.seed], [len(generated)])[0]) * math.fsum(weights)
    cumulated = 0.0
    chosen = 0
    for token_id, weight in enumerate(weights):
        if weight > 0:
            chosen = token_id
            cumulated += weight
            if cumulated > target:
                break
    return chosen


def adjusted_reference(
    logits: Sequence[float], sampling: Sampling, token_ids: Sequence[int], prompt_len: int
) -> list[float]:
    """The logits after bias, min_tokens and penalties."""
    scores = list(logits)
    generated = token_ids[prompt_len:]
    for token_id, bias in sampling.logit_bias:
        scores[token_id] += bias
    if len(generated) < sampling.min_tokens:
        for token_id in sampling.stop_token_ids:
            scores[token_id] = -math.inf
    for token_id in set(token_ids):
        if scores[token_id] < 0:
            scores[token_id] *= sampling.repetition_penalty
        else:
            scores[token_id] /= sampling.repetition_penalty
    for token_id, count in Counter(generated).items():
        scores[token_id] -= sampling.frequency_penalty * count
        scores[token_id] -= sampling.presence_penalty
    return scores


def weights_reference(scores: Sequence[float], sampling: Sampling) -> list[float]:
    """Weights after temperature, min_p, top_k and top_p; 0 for excluded tokens."""
    likeliest = max(scores)
    weights = [math.exp((score - likeliest) / sampling.temperature) for score in scores]
    weights = [weight if weight >= sampling.min_p else 0.0 for weight in weights]
    if 0 < sampling.top_k < len(weights):
        bound = sorted(weights, reverse=True)[sampling.top_k - 1]
        weights = [weight if weight >= bound else 0.0 for weight in weights]
    if sampling.top_p < 1:
        wanted = sampling.top_p * math.fsum(weights)
        kept = [0.0] * len(weights)
        mass = 0.0
        for token_id in sorted(range(len(weights)), key=lambda at: (-weights[at], at)):
            kept[token_id] = weights[token_id]
            mass += weights[token_id]
            if mass >= wanted:
                break
        weights = kept
    return weights
