"""Weights of linear layers in 8 or 4 bits: what the bits mean, and how floats become such bits.

    quantize(weight, bits) -> Quantized        round to nearest, group by group
    dequantize(quantized)  -> float32 weights  what every fast path is compared with

A group is 32 neighbouring inputs of one output. Its weights are ``scale * code`` (8 bits, codes
-127 .. 127) or ``scale * code + minimum`` (4 bits, codes 0 .. 15), scale and minimum in float16:
8.5 and 5 bits a weight. These are the values of GGUF's Q8_0 and Q4_1 blocks, so such a file's
weights are taken over as they are (gguf_blocks.py).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import nn

from pdserve.errors import ModelRefused

GROUP = 32  # inputs under one scale
_LARGEST = {8: 127, 4: 15}


class Quantization(enum.Enum):
    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Of the layers' weights; the output layer always has 8."""
        assert self is not Quantization.NONE
        return 8 if self is Quantization.INT8 else 4


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A weight [n, k], k a multiple of GROUP."""

    codes: torch.Tensor  # [n, k]: int8 (8 bits) or uint8 (4 bits)
    scales: torch.Tensor  # float16 [n, k / GROUP]
    minima: torch.Tensor | None  # like scales, with 4 bits

    @property
    def bits(self) -> int:
        return 8 if self.minima is None else 4


def can_quantize(linear: nn.Linear) -> bool:
    return linear.in_features % GROUP == 0


def quantize(weight: torch.Tensor, bits: int) -> Quantized:
    """``weight``: floats [n, k]. ModelRefused when a group has no finite float16 scale."""
    grouped = weight.detach().float().reshape(len(weight), -1, GROUP)
    if bits == 8:
        low = None
        scales = (grouped.abs().amax(-1) / _LARGEST[bits]).half()
    else:
        low = grouped.amin(-1).half()
        # From the minimum as it was rounded: the largest weight is reached from there.
        scales = ((grouped.amax(-1) - low.float()) / _LARGEST[bits]).clamp_min(0).half()
        grouped = grouped - low.float()[..., None]
    if not bool(scales.isfinite().all()) or (low is not None and not bool(low.isfinite().all())):
        raise ModelRefused(
            "a weight is not finite, or too large to be quantized (float16 scales); "
            "set model.quantization to none"
        )
    wide = scales.float()[..., None]
    codes = (grouped / torch.where(wide == 0, torch.ones_like(wide), wide)).round_()
    least = -_LARGEST[bits] if bits == 8 else 0
    codes = codes.clamp_(least, _LARGEST[bits]).to(torch.int8 if bits == 8 else torch.uint8)
    return Quantized(codes.flatten(1), scales, low)


def dequantize(quantized: Quantized) -> torch.Tensor:
    """The weights [n, k] as float32."""
    values = quantized.codes.float().reshape(len(quantized.codes), -1, GROUP)
    values *= quantized.scales.float()[..., None]
    if quantized.minima is not None:
        values += quantized.minima.float()[..., None]
    return values.flatten(1)
