"""Log-probabilities as the model gave them, before any sampling parameter touches the logits.

Ranks are exact: of equal log-probabilities the lowest token id comes first, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdserve.types import TokenLogprob, TopLogprob

# Rows of prompt_logprobs that are looked at together: bounds the memory of the ranking.
_ROWS_AT_ONCE = 64
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1


def raw_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """[n, V] float64 for float64 logits, else float32."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # Adding 0 turns -0.0 into 0.0, whose bits compare like its value.
    return torch.log_softmax(logits, dim=-1, dtype=wide).add_(0.0)


def top_ids(logprobs: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [n, count]: the likeliest ids of each row, likeliest first; count <= V."""
    if logprobs.dtype == torch.float64:
        return logprobs.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    # One integer orders by value, then by falling id; so equal values cannot be taken in any order.
    bits = logprobs.view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << _ID_BITS
    ids = torch.arange(logprobs.shape[1], device=logprobs.device)
    best = (ordered | (_ID_MASK - ids)).topk(count, dim=-1).values
    return _ID_MASK - (best & _ID_MASK)


def packed_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, count: int) -> torch.Tensor:
    """float64 [n, 1 + 2 * min(count, V)]: the tokens' logprobs, the top ids, the top logprobs.

    One tensor, so that one copy brings all of it to the host. ``token_ids``: int64 [n].
    """
    logprobs = raw_logprobs(logits)
    own = logprobs.gather(1, token_ids.unsqueeze(1)).double()
    count = min(count, logprobs.shape[1])
    if count == 0:
        return own
    ids = top_ids(logprobs, count)
    return torch.cat([own, ids.double(), logprobs.gather(1, ids).double()], dim=1)


def unpack_logprobs(token_id: int, packed: Sequence[float], count: int) -> TokenLogprob:
    """One row of packed_logprobs; ``count`` may be smaller than what was packed."""
    available = (len(packed) - 1) // 2
    ids = packed[1 : 1 + min(count, available)]
    values = packed[1 + available :]
    top = tuple(
        TopLogprob(int(other), value, rank)
        for rank, (other, value) in enumerate(zip(ids, values, strict=False), start=1)
    )
    return TokenLogprob(token_id, packed[0], top)


def prompt_logprobs(
    logits: torch.Tensor, targets: Sequence[int], count: int
) -> tuple[TokenLogprob, ...]:
    """The log-probability of ``targets[i]`` under row i of ``logits`` [n >= len(targets), V]."""
    found: list[TokenLogprob] = []
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        part = targets[start : start + _ROWS_AT_ONCE]
        ids = torch.tensor(part, dtype=torch.int64, device=logits.device)
        rows = packed_logprobs(logits[start : start + len(part)], ids, count).tolist()
        found.extend(
            unpack_logprobs(token_id, row, count) for token_id, row in zip(part, rows, strict=True)
        )
    return tuple(found)
