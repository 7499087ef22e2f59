"""Attention over a paged pool by torch's own operations: the reference, and for long rows.

Works for every dtype, device, head size, grouping of heads, window and softcap. A row's keys are
gathered from its blocks, or taken from the row itself when nothing precedes it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from pdserve.engine.plan import LongRow
from pdserve.engine.pool_view import LayerView


class MaskCache:
    """Masks of one step: all layers of a kind share them. [queries, keys], True where seen."""

    __slots__ = ("_masks",)

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int, int, int], torch.Tensor] = {}

    def get(
        self, start: int, count: int, first_key: int, window: int, device: torch.device
    ) -> torch.Tensor:
        """Queries at ``start .. start + count``, keys from ``first_key`` to the last query."""
        name = (start, count, first_key, window)
        found = self._masks.get(name)
        if found is None:
            found = causal_mask(start, count, first_key, window, device)
            self._masks[name] = found
        return found


def causal_mask(
    start: int, count: int, first_key: int, window: int, device: torch.device
) -> torch.Tensor:
    queries = torch.arange(start, start + count, device=device)[:, None]
    keys = torch.arange(first_key, start + count, device=device)[None, :]
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


def attend_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    masks: MaskCache,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """[T, H, value_size] of one row.

    query [H, T, size]; key [heads, K, size] and value [heads, K, value_size] are those of the
    positions up to the last query's, K of them. ``window`` and ``softcap``: 0 for none.
    """
    count, keys = query.shape[1], key.shape[1]
    first_key = start + count - keys
    plain = first_key == 0 and start == 0 and (window == 0 or window >= keys)
    if softcap:
        return _softcapped(query, key, value, start, masks, scale, window, softcap)
    mask = None
    if not plain and count > 1:
        mask = masks.get(start, count, first_key, window, query.device)
    out = scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=plain and count > 1,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out[0].transpose(0, 1)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    masks: MaskCache,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    heads, count, _ = query.shape
    groups, keys, _ = key.shape
    grouped = query.reshape(groups, heads // groups * count, query.shape[2])
    scores = torch.matmul(grouped, key.transpose(1, 2)) * scale
    wide = torch.float64 if scores.dtype is torch.float64 else torch.float32
    scores = softcap * torch.tanh(scores.to(wide) / softcap)
    mask = masks.get(start, count, start + count - keys, window, query.device)
    scores = scores.view(groups, heads // groups, count, keys).masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(value.dtype).view(groups, -1, keys)
    return torch.matmul(weights, value).view(heads, count, -1).transpose(0, 1)


def gather_row(layer: LayerView, row: LongRow, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [heads, K, size] that the row's queries can see, from the pool."""
    size = layer.keys.shape[1]
    end = row.start + row.end - row.begin
    first = max(0, row.start - window + 1) if window else 0
    low = first // size
    table = torch.from_numpy(row.table[low:]).to(layer.keys.device)
    skip, stop = first - low * size, end - low * size
    keys = layer.keys[table].flatten(0, 1)[skip:stop]
    values = layer.values[table].flatten(0, 1)[skip:stop]
    return keys.transpose(0, 1), values.transpose(0, 1)
