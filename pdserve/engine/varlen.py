"""All long rows of a step in one call of variable-length attention, in place of one call for each.

    rows = VarlenRows(plan, block_size, device)      once a step: where queries and keys lie
    rows.attend(attn, view, query, key, value, out, scale, window)      for each layer

Keys that precede a row are gathered from the pool for all rows at once; where nothing precedes any
of them, the step's own keys are taken as they are. The function is torch's ``varlen_attn`` (CUDA,
half precisions) or one like it: queries are aligned with the last keys, and several heads of
queries may share one of keys. Not run on a GPU yet; tested on the CPU with a function of the same
signature.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from pdserve.engine.plan import StepPlan
from pdserve.engine.pool_view import LayerView

Varlen = Callable[..., Any]
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256


def load_varlen(device: torch.device, dtype: torch.dtype) -> Varlen | None:
    """torch's function, where this torch has it for such a device and type."""
    if device.type != "cuda" or dtype not in DTYPES:
        return None
    try:
        module: Any = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    return grouped(module.varlen_attn)


def grouped(function: Varlen) -> Varlen | None:
    """``function`` for several query heads on one head of keys; None where it has no windows.

    torch has to be told from 2.12 on; before, nothing asks for it. What it then does is for the
    probe to judge.
    """
    named = inspect.signature(function).parameters
    if "window_size" not in named:
        return None
    return partial(function, enable_gqa=True) if "enable_gqa" in named else function


class VarlenRows:
    """``plan`` has long rows."""

    def __init__(self, plan: StepPlan, block_size: int, device: torch.device) -> None:
        rows = plan.long_rows
        queries = [row.end - row.begin for row in rows]
        keys = [row.start + row.end - row.begin for row in rows]
        fresh = not any(row.start for row in rows)
        parts = [
            np.concatenate([np.arange(row.begin, row.end) for row in rows]),
            np.cumsum([0, *queries]),
            np.cumsum([0, *keys]),
        ]
        if not fresh:
            places = [np.arange(count) for count in keys]
            blocks = [row.table[at // block_size] for row, at in zip(rows, places, strict=True)]
            parts += [np.concatenate(blocks), np.concatenate(places) % block_size]
        packed = torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device)
        sizes = [len(part) for part in parts]
        self._places, self._query_ends, self._key_ends, *slots = torch.split(packed, sizes)
        self._slots = tuple(slots)  # empty: nothing precedes any row
        self._most = max(queries), max(keys)

    @staticmethod
    def takes(view: LayerView, softcap: float) -> bool:
        size = view.keys.shape[-1]
        return not softcap and size == view.values.shape[-1] and size <= LARGEST_HEAD

    def attend(
        self,
        attn: Varlen,
        view: LayerView,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        window: int,
    ) -> None:
        """query [H, T, size], key and value [heads, T, size], out [T, H, size]: of the whole line.

        The rows' KV is in the pool already.
        """
        if self._slots:
            keys, values = view.keys[self._slots], view.values[self._slots]
        else:
            keys, values = (one.transpose(0, 1)[self._places] for one in (key, value))
        out[self._places] = attn(
            query.transpose(0, 1)[self._places],
            keys,
            values,
            self._query_ends,
            self._key_ends,
            *self._most,
            scale=scale,
            # Tokens before a query that it sees; itself is not counted.
            window_size=(window - 1 if window else -1, 0),
        )
