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
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from pdserve.engine.gather import MaskCache, attend_row, gather_row
from pdserve.engine.layout import LayerSpan
from pdserve.engine.native import NativeLayer, NativeStep, native_supports
from pdserve.engine.plan import StepPlan
from pdserve.engine.pool_view import LayerView, PoolView
from pdserve.engine.triton_layer import TritonKernels
from pdserve.engine.varlen import Varlen, VarlenRows

IMPLEMENTATION = "pdserve_paged"
# The attribute of an attention module that holds its PagedLayer.
LAYER_ATTRIBUTE = "pdserve_layer"
# With the native kernel, rows of at most so many tokens are computed token by token.
NATIVE_SHORT_ROWS = 8


class Kernels(Protocol):
    """What writes a step's KV into the pool and attends its short rows there."""

    short_limit: int  # rows of at most so many tokens are short
    varlen: Varlen | None  # attends all long rows in one call

    def layer(self, pool: PoolView, span: LayerSpan) -> Any:
        """Bound to a layer; called as NativeLayer is, with what ``step`` made."""
        ...

    def step(self, plan: StepPlan, device: torch.device) -> Any: ...


class _NativeKernels:
    short_limit = NATIVE_SHORT_ROWS
    varlen: Varlen | None = None

    def __init__(self, library: CDLL) -> None:
        self._library = library

    def layer(self, pool: PoolView, span: LayerSpan) -> NativeLayer:
        return NativeLayer(self._library, pool, span)

    def step(self, plan: StepPlan, device: torch.device) -> NativeStep:
        return NativeStep(plan)


def _kernels_for(library: CDLL | TritonKernels | None, pool: PoolView) -> Kernels | None:
    if isinstance(library, TritonKernels):
        return library
    if library is not None and native_supports(pool.blocks.dtype, pool.blocks.device):
        return _NativeKernels(library)
    return None


class _Step:
    """What all layers of one step share."""

    __slots__ = ("blocks", "long_rows", "masks", "offsets", "prepared", "varlen")

    def __init__(self, plan: StepPlan | None, prepared: Any, device: torch.device) -> None:
        self.long_rows = plan.long_rows if plan is not None else ()
        self.masks = MaskCache()
        self.varlen: VarlenRows | None = None  # the long rows, where they go in one call
        self.prepared = prepared  # for the kernels; None where there are none
        self.blocks: torch.Tensor | None = None
        self.offsets: torch.Tensor | None = None
        if prepared is None and plan is not None:
            self.blocks = torch.from_numpy(plan.slot_blocks).to(device)
            self.offsets = torch.from_numpy(plan.slot_offsets).to(device)


class PagedAttention:
    """All layers of one model over one pool; one thread at a time."""

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        pool: PoolView,
        library: CDLL | TritonKernels | None,
    ) -> None:
        assert len(modules) == len(pool.layers), "one attention module for each layer of the pool"
        self._kernels = kernels = _kernels_for(library, pool)
        self.pool = pool
        self.short_limit = kernels.short_limit if kernels else 0
        self.varlen = kernels.varlen if kernels else None
        self.current: _Step | None = None
        self.calls = 0  # layers that attended in the current step
        self._modules = tuple(modules)
        for index, module in enumerate(modules):
            kernel = kernels.layer(pool, pool.layout.layers[index]) if kernels else None
            setattr(module, LAYER_ATTRIBUTE, _PagedLayer(self, pool.layers[index], kernel))

    @contextmanager
    def step(self, plan: StepPlan | None, prepared: Any = None) -> Iterator[None]:
        """``prepared``, in place of a plan: one of short rows alone, as the kernels want it."""
        device = self.pool.blocks.device
        if plan is not None and self._kernels is not None:
            prepared = self._kernels.step(plan, device)
        self.current = _Step(plan, prepared, device)
        if plan is not None and plan.long_rows and self.varlen is not None:
            self.current.varlen = VarlenRows(plan, self.pool.layout.block_size, device)
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

    def __init__(self, attention: PagedAttention, view: LayerView, kernel: Any) -> None:
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
        if self._kernel is not None:
            self._kernel(step.prepared, query, key, value, out, scale, window, softcap)
        else:
            where = (step.blocks, step.offsets)
            view.keys[where] = key.transpose(0, 1)
            view.values[where] = value.transpose(0, 1)
        if step.varlen is not None and attention.varlen and step.varlen.takes(view, softcap):
            step.varlen.attend(attention.varlen, view, query, key, value, out, scale, window)
            return out if dtype is kind else out.to(dtype)
        for row in step.long_rows:
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
