"""Linear layers whose bfloat16 weights are packed once for the processor's matrix kernels.

A plain nn.Linear has its weights reordered by oneDNN in every call, which for few rows costs more
than the product. The results are those of the plain layer up to the order of sums. In ``fast``
numerics, on CPUs, each plain layer becomes one of our own kernels' (tiles.py) where these work,
else one of oneDNN's (PackedLinear) where that has bfloat16 products; everywhere else it stays.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import nn

from pdserve.engine.tiles import TiledLinear, can_tile, tiles_work


class PackedLinear(nn.Module):
    """Takes over a bfloat16 nn.Linear on the CPU; keeps nothing of it but the packed weights."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach())
        self.bias = plain.bias

    @property
    def weight(self) -> torch.Tensor:
        """A plain copy [out, in], for model code that looks at its layers' weights."""
        dense: torch.Tensor = self.packed.to_dense()
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, "none", [], ""
        )
        return out


def onednn_packs() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor."""
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_pack(dtype: torch.dtype, device: torch.device, library: CDLL | None) -> bool:
    return (
        dtype is torch.bfloat16 and device.type == "cpu" and (tiles_work(library) or onednn_packs())
    )


class LinearPacker:
    """Replaces plain bfloat16 nn.Linear layers by packed ones, and counts what these take."""

    def __init__(self, library: CDLL | None = None) -> None:
        self._library = library if tiles_work(library) else None
        self._onednn = onednn_packs()
        self.packed_bytes = 0

    @property
    def tiles(self) -> bool:
        """Whether layers are packed for our own kernels."""
        return self._library is not None

    @torch.no_grad()
    def replace(self, parent: nn.Module, name: str) -> None:
        """``parent``'s child, when it is one of those; its weights are let go."""
        child = parent.get_submodule(name)
        if type(child) is not nn.Linear or child.weight.dtype is not torch.bfloat16:
            return
        packed: nn.Module
        if self._library is not None and can_tile(child):
            packed = TiledLinear(child, self._library)
        elif self._onednn:
            packed = PackedLinear(child)
        else:
            return
        self.packed_bytes += 2 * child.in_features * child.out_features
        setattr(parent, name, packed)
        # Whoever still holds the plain layer, for its bias, holds no weights.
        child._parameters.pop("weight")

    def replace_all(self, model: nn.Module) -> None:
        for parent in list(model.modules()):
            for name, _ in list(parent.named_children()):
                self.replace(parent, name)
