"""Linear layers over quantized weights: in the native kernels, or as plain layers of those values.

    quantize_linears(model, ...)   every plain nn.Linear with whole groups of inputs is replaced

In ``fast`` bfloat16, on processors that have the kernels (kernels/groups.h), a layer keeps its
codes alone (QuantizedLinear). Everywhere else it becomes a plain layer whose weights are the
dequantized values in the model's dtype: as large and fast as before, and the reference of the
kernels.
"""

from __future__ import annotations

from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdserve.engine.gguf_blocks import read_blocks
from pdserve.engine.quantized import (
    GROUP,
    Quantization,
    Quantized,
    can_quantize,
    dequantize,
    quantize,
)
from pdserve.engine.tiles import PANEL, Linear, run_linear
from pdserve.engine.weights import weights_revision

_PAIRS = GROUP // 2


class QuantizedLinear(nn.Module):
    """A bfloat16 layer on the CPU; keeps nothing but packed codes, and the bias."""

    def __init__(
        self,
        packed: torch.Tensor,
        bits: int,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        library: CDLL,
    ) -> None:
        """``packed``: of ``pack_groups``. ``shape``: outputs, inputs."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.bits = bits
        self.packed = packed
        self.bias = bias
        self._library = library

    @classmethod
    def of(cls, quantized: Quantized, bias: nn.Parameter | None, library: CDLL) -> QuantizedLinear:
        n, k = quantized.codes.shape
        return cls(pack_groups(quantized), quantized.bits, (n, k), bias, library)

    @classmethod
    def over(
        cls, packed: torch.Tensor, bits: int, plain: nn.Linear, library: CDLL
    ) -> QuantizedLinear:
        """Over codes that were packed elsewhere. ValueError: they are not this layer's."""
        scales = 2 * PANEL * (1 if bits == 8 else 2)
        panels, groups = -(-plain.out_features // PANEL), plain.in_features // GROUP
        shape = (panels, groups, PANEL * GROUP * bits // 8 + scales)
        if packed.shape != shape or packed.dtype is not torch.uint8 or not can_quantize(plain):
            raise ValueError(f"{tuple(packed.shape)} are no packed codes of {plain}")
        return cls(packed, bits, _shape(plain), plain.bias, library)

    @property
    def struct(self) -> Linear:
        """For the kernels; good for as long as this module."""
        return Linear(
            packed=self.packed.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            n=self.out_features,
            k=self.in_features,
            bits=self.bits,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_linear(self._library, self.struct, x)


@dataclass(frozen=True, slots=True)
class QuantizedLayers:
    """What quantize_linears did."""

    layers: int = 0
    taken: int = 0  # of them: with the codes of the given blocks; the others were rounded
    packed_bytes: int = 0  # of the layers in the kernels: all, or none
    revision: str = ""  # of weights that were taken as they are


def groups_work(library: CDLL | None) -> bool:
    """Whether ``library`` has the kernels for this processor, and they are right on a sample."""
    if library is None or not library.pdserve_has_groups():
        return False
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(45, 3 * GROUP, generator=draw)
    for bits in (8, 4):
        quantized = quantize(weight, bits)
        layer = QuantizedLinear.of(quantized, None, library)
        for rows in (1, 17):
            x = torch.randn(rows, 3 * GROUP, generator=draw).to(torch.bfloat16)
            exact = x.double() @ dequantize(quantized).double().T
            if not float((layer(x).double() - exact).abs().max()) < 0.2:
                return False
    return True


@torch.no_grad()
def quantize_linears(
    model: Any,
    quantization: Quantization,
    blocks: Path | None,
    library: CDLL | None,
) -> QuantizedLayers:
    """Replaces the layers or their weights; those without whole groups of inputs stay.

    ``blocks``: a file with weights that are quantized already (gguf_blocks.py). ``library``: the
    kernels if they are to be used. ModelRefused for weights that cannot be quantized.
    """
    given = {} if blocks is None else read_blocks(blocks)
    revision = "" if blocks is None else weights_revision((blocks,))
    native = groups_work(library)
    head = model.get_output_embeddings()
    layers = taken = packed_bytes = 0
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or not can_quantize(layer):
            continue
        bits = 8 if layer is head else quantization.bits
        quantized = given.get(name)
        if quantized is None or quantized.bits != bits or quantized.codes.shape != _shape(layer):
            quantized = quantize(layer.weight, bits)
        else:
            taken += 1
        layers += 1
        if native and library is not None and layer.weight.dtype is torch.bfloat16:
            parent, _, own = name.rpartition(".")
            packed = QuantizedLinear.of(quantized, layer.bias, library)
            packed_bytes += packed.packed.numel()
            setattr(model.get_submodule(parent), own, packed)
        else:
            values = dequantize(quantized).to(layer.weight.device, layer.weight.dtype)
            # A parameter of its own: the output layer's may be the embeddings', which stay.
            layer.weight = nn.Parameter(values, requires_grad=False)
    return QuantizedLayers(layers, taken, packed_bytes, revision)


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def pack_groups(quantized: Quantized) -> torch.Tensor:
    """Bytes [panels, groups, bytes of one], as kernels/groups.h reads them; padded with zeros."""
    codes = _panels(quantized.codes)  # [panels, 32, k]
    count, _, k = codes.shape
    codes = codes.view(count, PANEL, k // GROUP, _PAIRS, 2).permute(0, 2, 3, 1, 4)
    if quantized.bits == 8:
        # A pair's 64 codes: outputs 0 .. 15 and 16 .. 31, woven in runs of 8.
        woven = codes.reshape(count, -1, _PAIRS, 2, 4, 8).transpose(3, 4).flatten(2)
        packed = (woven.abs() | (woven & -128)).view(torch.uint8)
    else:
        # Two pairs' 128 codes: four vectors of 32, one in each nibble of 32 words.
        words = codes.reshape(count, -1, _PAIRS // 2, 4, 32).to(torch.int32)
        words = (
            words[..., 0, :]
            | words[..., 1, :] << 4
            | words[..., 2, :] << 8
            | words[..., 3, :] << 12
        )
        low, high = words & 255, words >> 8
        packed = torch.stack([low, high], dim=-1).to(torch.uint8).flatten(2)
    parts = [packed]
    for own in (quantized.scales, quantized.minima):
        if own is not None:
            parts.append(_panels(own).transpose(1, 2).contiguous().view(torch.uint8))
    return torch.cat(parts, dim=-1)


def _panels(rows: torch.Tensor) -> torch.Tensor:
    """[n, x] -> [panels, 32, x]."""
    count = -(-len(rows) // PANEL)
    padding = rows.new_zeros(count * PANEL - len(rows), rows.shape[1])
    return torch.cat([rows, padding]).view(count, PANEL, -1)
