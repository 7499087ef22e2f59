"""A step's plan as a device needs it: one array of int32, copied there at once.

    pack_plan(plan, size) -> array        pure; padded to ``size`` tokens where that is more
    DevicePlan(buffer, size, items)       views of the array's parts on the device

Its parts: the tables' width; for each token its id, position, block and place in the block; for
each item (a token that is attended straight from the pool) its place in the line, its row and how
many keys it sees; the tables. Padding belongs to no row: it sees no key, and its block is -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pdserve.engine.plan import StepPlan

Int32 = npt.NDArray[np.int32]
_PER_TOKEN, _PER_ITEM = 4, 3
NO_BLOCK = -1


def packed_size(tokens: int, items: int, table_entries: int) -> int:
    return 1 + _PER_TOKEN * tokens + _PER_ITEM * items + table_entries


def pack_plan(plan: StepPlan, size: int) -> Int32:
    """``size``: tokens of the result; where it is more than the plan's, all of these are items."""
    padding = size - plan.size
    assert padding >= 0
    assert not padding or len(plan.short_tokens) == plan.size, "only single tokens are padded"
    rest = np.zeros(padding, np.int32)
    none = np.full(padding, NO_BLOCK, np.int32)
    parts = (
        [plan.tables.shape[1]],
        *(plan.tokens, rest),
        *(plan.positions, rest),
        *(plan.slot_blocks, none),
        *(plan.slot_offsets, rest),
        *(plan.short_tokens, np.arange(plan.size, size, dtype=np.int32)),
        *(plan.short_rows, rest),
        *(plan.short_contexts, rest),
        plan.tables.reshape(-1),
    )
    return np.concatenate(parts).astype(np.int32, copy=False)


def pack_padding(size: int) -> Int32:
    """``size`` tokens that belong to no row."""
    rest = np.zeros(size, np.int32)
    none = np.full(size, NO_BLOCK, np.int32)
    items = np.arange(size, dtype=np.int32)
    # The width of the tables, which are empty; then as in ``pack_plan``.
    return np.concatenate(([1], rest, rest, none, rest, items, rest, rest)).astype(np.int32)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """``buffer``: int32 on the device, at least as long as what was packed."""

    buffer: torch.Tensor
    size: int  # tokens
    items: int

    def _part(self, token_parts: int, item_parts: int, count: int) -> torch.Tensor:
        begin = 1 + token_parts * self.size + item_parts * self.items
        return self.buffer[begin : begin + count]

    @property
    def tokens(self) -> torch.Tensor:
        return self._part(0, 0, self.size)

    @property
    def positions(self) -> torch.Tensor:
        return self._part(1, 0, self.size)

    @property
    def slot_blocks(self) -> torch.Tensor:
        return self._part(2, 0, self.size)

    @property
    def slot_offsets(self) -> torch.Tensor:
        return self._part(3, 0, self.size)

    @property
    def item_tokens(self) -> torch.Tensor:
        return self._part(_PER_TOKEN, 0, self.items)

    @property
    def item_rows(self) -> torch.Tensor:
        return self._part(_PER_TOKEN, 1, self.items)

    @property
    def item_contexts(self) -> torch.Tensor:
        return self._part(_PER_TOKEN, 2, self.items)

    @property
    def tables(self) -> torch.Tensor:
        """[rows * width], and whatever the buffer holds behind it."""
        return self.buffer[packed_size(self.size, self.items, 0) :]


def upload(plan: StepPlan, device: torch.device) -> DevicePlan:
    packed = torch.from_numpy(pack_plan(plan, plan.size))
    if device.type == "cuda":
        packed = packed.pin_memory()
    items = len(plan.short_tokens)
    return DevicePlan(packed.to(device, non_blocking=True), plan.size, items)
