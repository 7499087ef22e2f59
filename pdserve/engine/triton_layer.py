"""Triton's paged attention (triton_paged.py) bound to a layer of a pool, and whether it can serve.

    load_triton(device, dtype) -> TritonLoad      asked once: kernels, or the reason for none
    kernels.layer(pool, span)(step, query, ...)   writes the step's KV, then attends its items

Before they serve, the probe at start-up compares them with the model's own attention (probe.py);
where they fail it, keys are gathered, and the log says why.
Not run on a GPU yet: tested in Triton's interpreter, which has no bfloat16.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from pdserve.engine.device_plan import DevicePlan, upload
from pdserve.engine.layout import LayerSpan
from pdserve.engine.plan import StepPlan
from pdserve.engine.pool_view import PoolView
from pdserve.engine.varlen import Varlen, load_varlen

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STEP_KEYS = 64
LEAST_ROWS = 16  # of a matrix product
MOST_PARTS = 16
WANTED_PROGRAMS = 256  # about two for each processor of a large device


@dataclass(frozen=True, slots=True)
class TritonLoad:
    """Kernels, or the reason for none."""

    kernels: TritonKernels | None
    reason: str


class TritonKernels:
    """``module``: triton_paged, imported."""

    # Longer rows are attended as a whole.
    short_limit = 1

    def __init__(self, module: Any, varlen: Varlen | None = None) -> None:
        """``varlen``: attends all long rows in one call; None attends one after the other."""
        self.module = module
        self.varlen = varlen

    def layer(self, pool: PoolView, span: LayerSpan) -> TritonLayer:
        return TritonLayer(self.module, pool, span)

    def step(self, plan: StepPlan, device: torch.device) -> DevicePlan:
        return upload(plan, device)


class TritonLayer:
    """The kernels bound to one layer of a pool."""

    __slots__ = ("_blocks", "_module", "_size", "_span", "_stride")

    def __init__(self, module: Any, pool: PoolView, span: LayerSpan) -> None:
        self._module = module
        self._blocks = pool.blocks
        self._stride = pool.layout.span_elements
        self._size = pool.layout.block_size
        self._span = span

    def __call__(
        self,
        step: DevicePlan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> None:
        """As NativeLayer: query [H, T, key_size], key and value [heads, T, size], out [T, H, ...].

        Launches only; nothing waits for the device, nothing depends on the step's values.
        """
        span = self._span
        for source, offset, size in (
            (key, span.key_offset, span.key_size),
            (value, span.value_offset, span.value_size),
        ):
            self._module.write_kv[(step.size, span.heads)](
                source,
                self._blocks,
                step.slot_blocks,
                step.slot_offsets,
                source.stride(0),
                source.stride(1),
                self._stride,
                offset,
                span.heads,
                SIZE=size,
                WIDE=power(size),
            )
        if step.items:
            self._attend(step, query, out, scale, window, softcap)

    def _attend(
        self,
        step: DevicePlan,
        query: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> None:
        span = self._span
        group = query.shape[0] // span.heads
        rows, wide = max(LEAST_ROWS, power(group)), max(LEAST_ROWS, power(span.value_size))
        parts = parts_for(step.items * span.heads)
        room = (step.items, span.heads, parts, rows)
        mixed = torch.empty((*room, wide), dtype=torch.float32, device=out.device)
        sums = torch.empty((*room, 2), dtype=torch.float32, device=out.device)
        self._module.attend_part[(step.items, span.heads, parts)](
            query,
            self._blocks,
            step.buffer,
            step.item_tokens,
            step.item_rows,
            step.item_contexts,
            step.tables,
            mixed,
            sums,
            query.stride(0),
            query.stride(1),
            self._stride,
            span.key_offset,
            span.value_offset,
            span.heads,
            scale,
            softcap,
            window,
            GROUP=group,
            ROWS=rows,
            KEY=span.key_size,
            KEY_WIDE=max(LEAST_ROWS, power(span.key_size)),
            VALUE=span.value_size,
            VALUE_WIDE=wide,
            BLOCK=self._size,
            STEP=STEP_KEYS,
            PARTS=parts,
            CAPPED=softcap > 0,
        )
        self._module.join_parts[(step.items, query.shape[0])](
            mixed,
            sums,
            out,
            step.item_tokens,
            out.stride(0),
            GROUP=group,
            ROWS=rows,
            VALUE=span.value_size,
            VALUE_WIDE=wide,
            PARTS=parts,
        )


def power(size: int) -> int:
    """The power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def parts_for(programs: int) -> int:
    """Into how many parts contexts are cut: by the batch's size alone, so that a graph holds it."""
    return min(MOST_PARTS, power(-(-WANTED_PROGRAMS // max(1, programs))))


def load_triton(device: torch.device, dtype: torch.dtype) -> TritonLoad:
    if device.type != "cuda":
        return TritonLoad(None, f"Triton's kernels are for CUDA devices, not {device.type}")
    if dtype not in DTYPES:
        return TritonLoad(None, f"Triton's kernels do not compute in {dtype}")
    if importlib.util.find_spec("triton") is None:
        return TritonLoad(None, "triton is not installed")
    try:
        module = importlib.import_module("pdserve.engine.triton_paged")
    except (ImportError, RuntimeError, OSError) as error:
        return TritonLoad(None, f"triton cannot be imported: {error}")
    return TritonLoad(TritonKernels(module, load_varlen(device, dtype)), "")
