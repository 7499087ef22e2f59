"""The attention that transformers' models call when they run over a paged KV pool.

    register()                                         once in a process
    attach(modules, pool, kernel) -> PagedAttention    binds each attention module to its layer
    with attention.step(plan): model(...)              each layer writes its KV, then attends
    attention.detach()

A module finds its layer by an attribute of its own, so nothing depends on whether a model hands
keyword arguments through. No mask is ever built: a mask function is registered for tracing only
(see trace.py), and transformers skips masks for implementations without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from typing import Any

import torch
from transformers import AttentionInterface

from pdserve.engine.gather import MaskCache, attend_row, gather_row
from pdserve.engine.native import NativeLayer, NativeStep, native_supports
from pdserve.engine.plan import StepPlan
from pdserve.engine.pool_view import LayerView, PoolView

IMPLEMENTATION = "pdserve_paged"
# The attribute of an attention module that holds its PagedLayer.
LAYER_ATTRIBUTE = "pdserve_layer"
# With the native kernel, rows of at most so many tokens are computed token by token.
NATIVE_SHORT_ROWS = 8


class _Step:
    """What all layers of one step share."""

    __slots__ = ("blocks", "masks", "native", "offsets", "plan")

    def __init__(self, plan: StepPlan, native: bool, device: torch.device) -> None:
        self.plan = plan
        self.masks = MaskCache()
        self.native = NativeStep(plan) if native else None
        self.blocks: torch.Tensor | None = None
        self.offsets: torch.Tensor | None = None
        if not native:
            self.blocks = torch.from_numpy(plan.slot_blocks).to(device)
            self.offsets = torch.from_numpy(plan.slot_offsets).to(device)


class PagedAttention:
    """All layers of one model over one pool; one thread at a time."""

    def __init__(
        self, modules: Sequence[torch.nn.Module], pool: PoolView, library: CDLL | None
    ) -> None:
        assert len(modules) == len(pool.layers), "one attention module for each layer of the pool"
        device = pool.blocks.device
        native = library if native_supports(pool.blocks.dtype, device) else None
        self.pool = pool
        self.short_limit = NATIVE_SHORT_ROWS if native else 0
        self.current: _Step | None = None
        self.calls = 0  # layers that attended in the current step
        self._modules = tuple(modules)
        for index, module in enumerate(modules):
            kernel = NativeLayer(native, pool, pool.layout.layers[index]) if native else None
            setattr(module, LAYER_ATTRIBUTE, _PagedLayer(self, pool.layers[index], kernel))

    @contextmanager
    def step(self, plan: StepPlan) -> Iterator[None]:
        self.current = _Step(plan, self.short_limit > 0, self.pool.blocks.device)
        self.calls = 0
        try:
            yield
        finally:
            self.current = None

    def detach(self) -> None:
        for module in self._modules:
            delattr(module, LAYER_ATTRIBUTE)


class _PagedLayer:
    """One layer's keys and values in the pool, and how to attend over them."""

    __slots__ = ("_attention", "_kernel", "_view")

    def __init__(
        self, attention: PagedAttention, view: LayerView, kernel: NativeLayer | None
    ) -> None:
        self._attention = attention
        self._view = view
        self._kernel = kernel

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """query [H, T, size], key and value [heads, T, size] -> contiguous [T, H, value_size]."""
        attention, view = self._attention, self._view
        attention.calls += 1
        step = attention.current
        assert step is not None, "the model ran outside of a step"
        dtype, kind = query.dtype, view.keys.dtype
        query, key, value = (_plain(x, kind) for x in (query, key, value))
        out = torch.empty(
            (query.shape[1], query.shape[0], value.shape[2]), dtype=kind, device=query.device
        )
        if self._kernel is not None and step.native is not None:
            self._kernel(step.native, query, key, value, out, scale, window, softcap)
        else:
            where = (step.blocks, step.offsets)
            view.keys[where] = key.transpose(0, 1)
            view.values[where] = value.transpose(0, 1)
        for row in step.plan.long_rows:
            here = slice(row.begin, row.end)
            keys, values = key[:, here], value[:, here]
            if row.start:
                keys, values = gather_row(view, row, window)
            out[here] = attend_row(
                query[:, here], keys, values, row.start, step.masks, scale, window, softcap
            )
        return out if dtype is kind else out.to(dtype)


def _plain(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.dtype is not dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registered function: query [1, H, T, size], key and value [1, heads, T, size].

    What other keyword arguments may mean was checked when the model was traced.
    """
    layer: _PagedLayer = getattr(module, LAYER_ATTRIBUTE)
    out = layer.attend(
        query[0],
        key[0],
        value[0],
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out[None], None


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
