"""What one KV block looks like in memory, and the fingerprint of all that must agree about it.

A block is ``block_size`` tokens over all layers in one contiguous span. Layer l's keys lie at
``key_offset`` as [block_size, heads, key_size], its values at ``value_offset`` as
[block_size, heads, value_size]; offsets and sizes count elements, so layers may differ in shape.
Torch-free: the arithmetic is shared with parts that never see a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pdserve.types import Fingerprint

ITEM_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class LayerShape:
    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class LayerSpan:
    """Where one layer lies inside a block; in elements."""

    heads: int
    key_size: int
    value_size: int
    key_offset: int
    value_offset: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    block_size: int  # tokens
    dtype: str  # a key of ITEM_BYTES
    layers: tuple[LayerSpan, ...]
    span_elements: int

    @property
    def span_bytes(self) -> int:
        return self.span_elements * ITEM_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        return self.span_bytes // self.block_size

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


def block_layout(block_size: int, dtype: str, layers: tuple[LayerShape, ...]) -> BlockLayout:
    spans = []
    offset = 0
    for layer in layers:
        key_elements = block_size * layer.heads * layer.key_size
        value_elements = block_size * layer.heads * layer.value_size
        spans.append(
            LayerSpan(layer.heads, layer.key_size, layer.value_size, offset, offset + key_elements)
        )
        offset += key_elements + value_elements
    return BlockLayout(block_size, dtype, tuple(spans), offset)


def fingerprint(layout: BlockLayout, identity: Mapping[str, object]) -> Fingerprint:
    """32 bytes over the layout and ``identity`` (model, weights revision, numerics, RoPE, ...)."""
    text = json.dumps(
        {"layout": asdict(layout), "identity": dict(identity)}, sort_keys=True, default=str
    )
    return Fingerprint(hashlib.sha256(text.encode()).digest())
