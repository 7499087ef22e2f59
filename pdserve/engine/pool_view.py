"""A KV pool's bytes seen as each layer's keys and values; views only, nothing is copied.

The views live as long as the pool's memory. Whoever writes through them is the engine's thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdserve.engine.layout import BlockLayout

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class LayerView:
    keys: torch.Tensor  # [blocks, block_size, heads, key_size]
    values: torch.Tensor  # [blocks, block_size, heads, value_size]


@dataclass(frozen=True, slots=True)
class PoolView:
    layout: BlockLayout
    blocks: torch.Tensor  # [blocks, span_elements] of the layout's dtype
    layers: tuple[LayerView, ...]

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[0]

    def zero_tail(self, block: int, used_tokens: int) -> None:
        """Zeroes the positions of ``block`` from ``used_tokens`` on, in every layer."""
        layout = self.layout
        first = layout.layers[0]
        row = first.heads * first.key_size
        if 2 * len(layout.layers) * layout.block_size * row == layout.span_elements and all(
            layer.heads * layer.key_size == row for layer in layout.layers
        ):
            # Equal layers: one strided write instead of two for each layer.
            equal = self.blocks[block].view(2 * len(layout.layers), layout.block_size, row)
            equal[:, used_tokens:].zero_()
            return
        for layer in self.layers:
            layer.keys[block, used_tokens:].zero_()
            layer.values[block, used_tokens:].zero_()


def pool_view(blocks: torch.Tensor, layout: BlockLayout) -> PoolView:
    """``blocks``: uint8 [blocks, span_bytes], contiguous, as PoolMemory holds them."""
    typed = blocks.view(TORCH_DTYPES[layout.dtype])
    size = layout.block_size
    layers = []
    for span in layout.layers:
        keys = typed[:, span.key_offset : span.key_offset + size * span.heads * span.key_size]
        values = typed[
            :, span.value_offset : span.value_offset + size * span.heads * span.value_size
        ]
        layers.append(
            LayerView(
                keys.view(-1, size, span.heads, span.key_size),
                values.view(-1, size, span.heads, span.value_size),
            )
        )
    return PoolView(layout, typed, tuple(layers))
