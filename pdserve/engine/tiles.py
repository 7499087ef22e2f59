"""Linear layers whose bfloat16 weights lie packed for our own matrix kernel (kernels/tiles.h).

    tiles_work(library)     are the kernels there, and do they compute what they should
    TiledLinear(plain, library)      takes over a plain nn.Linear, keeps only the packed weights

They serve both ways of running a model: transformers' layers call them one by one, the fused
decoder (fused.py) reads their packed weights in place.
"""

from __future__ import annotations

import ctypes
from ctypes import CDLL

import torch
from torch import nn

PANEL = 32  # outputs that lie together


class Linear(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("bits", ctypes.c_int64),  # of a weight; fewer than 16: quantized_linear.py
    )


class TiledLinear(nn.Module):
    """Takes over a bfloat16 nn.Linear on the CPU; keeps nothing of it but the packed weights."""

    def __init__(self, plain: nn.Linear, library: CDLL, packed: torch.Tensor | None = None) -> None:
        """``packed``: what ``pack`` made of the layer's weights elsewhere."""
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.packed = pack(plain.weight.detach()) if packed is None else packed
        self.bias = plain.bias
        self._library = library

    @classmethod
    def over(cls, packed: torch.Tensor, plain: nn.Linear, library: CDLL) -> TiledLinear:
        """Over weights that were packed elsewhere. ValueError: they are not this layer's."""
        shape = (-(-plain.out_features // PANEL), plain.in_features // 2, PANEL, 2)
        if packed.shape != shape or packed.dtype is not torch.bfloat16 or not can_tile(plain):
            raise ValueError(f"{tuple(packed.shape)} are no packed weights of {plain}")
        return cls(plain, library, packed)

    @property
    def weight(self) -> torch.Tensor:
        """A plain copy [out, in], for model code that looks at its layers' weights."""
        rows = self.packed.permute(0, 2, 1, 3).reshape(-1, self.in_features)
        return rows[: self.out_features].clone()

    @property
    def struct(self) -> Linear:
        """For the kernels; good for as long as this module."""
        return Linear(
            packed=self.packed.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            n=self.out_features,
            k=self.in_features,
            bits=16,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_linear(self._library, self.struct, x)


def run_linear(library: CDLL, linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., k] -> [..., n]."""
    x = x.contiguous()
    assert x.dtype is torch.bfloat16
    assert x.shape[-1] == linear.k
    out = torch.empty((*x.shape[:-1], linear.n), dtype=torch.bfloat16)
    library.pdserve_linear(
        ctypes.byref(linear),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(x.numel() // linear.k),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return out


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[n, k] -> [panels, k / 2, 32, 2], the last panel padded with zeros; k is even."""
    n, k = weight.shape
    panels = -(-n // PANEL)
    if n % PANEL:
        weight = torch.cat([weight, weight.new_zeros(panels * PANEL - n, k)])
    # A pair of inputs stays together, so it moves as one number of 32 bits.
    pairs = weight.contiguous().view(torch.int32).view(panels, PANEL, k // 2)
    packed = pairs.transpose(1, 2).contiguous()
    return packed.view(torch.bfloat16).view(panels, k // 2, PANEL, 2)


def can_tile(linear: nn.Linear) -> bool:
    return linear.weight.dtype is torch.bfloat16 and linear.in_features % 2 == 0


def tiles_work(library: CDLL | None) -> bool:
    """Whether ``library`` has the kernels for this processor, and they are right on a sample.

    A processor with matrix units (AMX) is left to oneDNN, which uses them.
    """
    if library is None or not library.pdserve_has_tiles() or torch.cpu._is_amx_tile_supported():
        return False
    draw = torch.Generator().manual_seed(5)
    plain = nn.Linear(70, 45, dtype=torch.bfloat16)
    with torch.inference_mode():
        for own in (plain.weight, plain.bias):
            own.copy_(torch.randn(own.shape, generator=draw))
        tiled = TiledLinear(plain, library)
        for rows in (1, 17):
            x = torch.randn(rows, 70, generator=draw).to(torch.bfloat16)
            exact = x.double() @ plain.weight.double().T + plain.bias.double()
            if not float((tiled(x).double() - exact).abs().max()) < 0.2:
                return False
    return True
