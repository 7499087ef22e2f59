"""A step's plan as a device needs it: one array of int32, copied there at once.

    pack_plan(plan, size) -> array        pure; padded to ``size`` tokens where that is more
    DevicePlan(buffer, size, items)       views of the array's parts on the device

Its parts: the tables' width; for each token its id, position, block and place in the block; for
each item (a token that is attended straight from the pool) its place in the line, its row and how
many keys it sees; the tables. Padding belongs to no row: it sees no key, and its block is -1.
Each part begins at a multiple of 16 bytes: Triton makes a kernel anew for every set of pointers of
which other ones are so aligned, and the first step that has it would wait for the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pdserve.engine.plan import StepPlan

Int32 = npt.NDArray[np.int32]
Parts = Sequence[npt.NDArray[np.signedinteger[Any]]]
_PER_TOKEN, _PER_ITEM = 4, 3
_ALIGNED = 4  # numbers of four bytes
NO_BLOCK = -1


def packed_size(tokens: int, items: int, table_entries: int) -> int:
    return _begin(tokens, items, _PER_TOKEN, _PER_ITEM) + table_entries


def _begin(tokens: int, items: int, token_parts: int, item_parts: int) -> int:
    """Where the part begins that so many parts of tokens and of items precede."""
    return _ALIGNED + token_parts * _up(tokens) + item_parts * _up(items)


def _up(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def pack_plan(plan: StepPlan, size: int) -> Int32:
    """``size``: tokens of the result; where it is more than the plan's, all of these are items."""
    padding = size - plan.size
    assert padding >= 0
    assert not padding or len(plan.short_tokens) == plan.size, "only single tokens are padded"
    of_tokens: Parts = (plan.tokens, plan.positions, plan.slot_blocks, plan.slot_offsets)
    of_items: Parts = (plan.short_tokens, plan.short_rows, plan.short_contexts)
    items = len(plan.short_tokens) + padding
    packed = np.zeros(packed_size(size, items, plan.tables.size), np.int32)
    packed[0] = plan.tables.shape[1]
    for number, part in enumerate(of_tokens):
        begin = _begin(size, items, number, 0)
        packed[begin : begin + plan.size] = part
    for number, part in enumerate(of_items):
        begin = _begin(size, items, _PER_TOKEN, number)
        packed[begin : begin + len(part)] = part
    packed[packed_size(size, items, 0) :] = plan.tables.reshape(-1)
    _pad(packed, size, items, padding)
    return packed


def pack_padding(size: int) -> Int32:
    """``size`` tokens that belong to no row."""
    packed = np.zeros(packed_size(size, size, 0), np.int32)
    packed[0] = 1  # the width of the tables, which are empty
    _pad(packed, size, size, size)
    return packed


def _pad(packed: Int32, size: int, items: int, padding: int) -> None:
    """The last ``padding`` tokens: no block, and a place in the line; all else of them is 0."""
    first = size - padding
    blocks = _begin(size, items, 2, 0)
    packed[blocks + first : blocks + size] = NO_BLOCK
    places = _begin(size, items, _PER_TOKEN, 0)
    if padding:
        packed[places + first : places + size] = np.arange(first, size, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """``buffer``: int32 on the device, at least as long as what was packed."""

    buffer: torch.Tensor
    size: int  # tokens
    items: int

    def _part(self, token_parts: int, item_parts: int, count: int) -> torch.Tensor:
        begin = _begin(self.size, self.items, token_parts, item_parts)
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
