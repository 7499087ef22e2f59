"""Draws one token per row from temperature, min_p, top_k, top_p and one uniform number.

logits [r, V] float64 -> weights (exp, the likeliest has 1) -> cut by min_p, top_k, top_p
-> cumulated in the order of token ids -> the first whose cumulated weight exceeds uniform * total.

Every operation works on each row alone, so a draw does not depend on its batch. On a CPU that holds
to the bit; a device may sum differently for other numbers of rows, which moves a border by about
1e-16. Nothing here waits for a device: counts stay tensors, except on the CPU, where looking at
them is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pdserve.types import Sampling

# The first guess of how many tokens make up top_p on a CPU, and how it grows.
_TOP_P_GUESS = 128
_TOP_P_GROWTH = 8

# Weights [r, V] -> which of them to keep, bool [r, V].
_Test = Callable[[torch.Tensor], torch.Tensor]


def draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: npt.NDArray[np.float64]
) -> torch.Tensor:
    """Token ids, int64 [r]. ``logits``: float64 [r, V], overwritten. NaN gives any id in range."""
    cumulated = cut_weights(logits, samplings).cumsum(-1)
    total = cumulated[:, -1:]
    target = torch.from_numpy(uniforms).to(logits.device).unsqueeze(1) * total
    # Rounding may have lifted the product to the total, which no token exceeds.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulated, target, right=True).squeeze(1)
    return chosen.clamp_(max=logits.shape[1] - 1)


def cut_weights(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Unnormalized probabilities [r, V], 0 for excluded tokens; overwrites ``logits``."""
    temperatures = _column([sampling.temperature for sampling in samplings], logits)
    # A row without any finite logit keeps zero weights instead of NaN.
    likeliest = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float64).min)
    weights = logits.sub_(likeliest).div_(temperatures).exp_()
    vocab_size = weights.shape[1]
    min_p = [row for row, sampling in enumerate(samplings) if sampling.min_p > 0]
    top_k = [row for row, sampling in enumerate(samplings) if 0 < sampling.top_k < vocab_size]
    top_p = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]
    if min_p:
        bounds = _column([samplings[row].min_p for row in min_p], weights)
        _keep(weights, min_p, lambda part: part >= bounds)
    if top_k:
        counts = [samplings[row].top_k for row in top_k]
        _keep(weights, top_k, lambda part: part >= _kth_largest(part, counts))
    if top_p:
        shares = _column([samplings[row].top_p for row in top_p], weights)
        _keep(weights, top_p, lambda part: _in_nucleus(part, shares))
    return weights


def _keep(weights: torch.Tensor, rows: list[int], test: _Test) -> None:
    """Zeroes in ``weights[rows]`` what ``test`` does not keep."""
    if len(rows) == len(weights):
        weights.mul_(test(weights))
        return
    index = torch.tensor(rows, device=weights.device)
    part = weights[index]
    weights[index] = part * test(part)


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _kth_largest(weights: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """[r, 1]: the ``counts[i]``-th largest weight of row i. Its equals are kept with it."""
    largest = weights.topk(max(counts), dim=-1).values
    return largest.gather(1, torch.tensor(counts, device=weights.device).unsqueeze(1) - 1)


def _in_nucleus(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The fewest likeliest tokens whose weights reach ``shares`` [r, 1] of the row's total.

    Of equal weights the lowest ids are taken first. At least one token is kept.
    """
    wanted = shares * weights.cumsum(-1)[:, -1:]
    largest, cumulated = _largest_until(weights, wanted)
    # A token belongs when those before it do not reach the share yet.
    count = torch.searchsorted(cumulated, wanted).clamp_(max=largest.shape[1] - 1) + 1
    smallest = largest.gather(1, count - 1)
    reaching = weights >= smallest
    if _on_cpu(weights) and bool((reaching.sum(-1, keepdim=True) == count).all()):
        return reaching  # no equals are left out: nothing to rank
    above = weights > smallest
    equal = reaching & ~above
    places = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= places))


def _largest_until(
    weights: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest weights, descending, and their running sums; enough to reach ``wanted``.

    Sums run one by one, so that a longer list begins with the same sums as a shorter one.
    """
    vocab_size = weights.shape[1]
    count = _TOP_P_GUESS
    # Looking whether a guess was enough costs a device a round trip, more than sorting does.
    while _on_cpu(weights) and count * _TOP_P_GROWTH < vocab_size:
        largest = weights.topk(count, dim=-1).values
        cumulated = largest.cumsum(-1)
        if bool((cumulated[:, -1:] >= wanted).all()):
            return largest, cumulated
        count *= _TOP_P_GROWTH
    largest = weights.sort(dim=-1, descending=True).values
    return largest, largest.cumsum(-1)
