"""The 4- and 8-bit blocks of a GGUF file, kept beside the bfloat16 weights that they became.

    keep_blocks(gguf, model, folder)      at conversion: <folder>/blocks/<layer's name>...
    blocks_file(folder)                   the file, or None for a folder that has none
    read_blocks(file) -> {layer: Quantized}

bfloat16 rounds a block's values once more; with model.quantization the blocks themselves are used.
Only blocks whose values are, rounded to bfloat16, exactly the converted layer's weights are kept,
which also proves that a tensor belongs to the layer and that its rows are in the layer's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pdserve.engine.quantized import GROUP, Quantized, dequantize
from pdserve.errors import ModelRefused

_FILE = Path("blocks", "blocks.safetensors")
_TENSORS: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_DTYPES = {"codes8": torch.int8, "codes4": torch.uint8, "scales": torch.float16}
_DTYPES["minima"] = torch.float16


def blocks_file(folder: Path) -> Path | None:
    file = folder / _FILE
    return file if file.is_file() else None


def keep_blocks(gguf: Path, model: nn.Module, folder: Path) -> int:
    """How many layers' blocks were kept. ``model``: with the dense weights of the file."""
    # Imported here: only a conversion needs it.
    from gguf import GGUFReader  # noqa: PLC0415

    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    kept: dict[str, torch.Tensor] = {}
    count = 0
    for name, layer in model.named_modules():
        if type(layer) is not nn.Linear:
            continue
        for tensor_name in _names(name):
            quantized = _blocks_of(tensors.get(tensor_name))
            found = None if quantized is None else _in_order(quantized, layer, model)
            if found is not None:
                kept |= _stored(name, found)
                count += 1
                break
    if kept:
        file = folder / _FILE
        file.parent.mkdir()
        save_file(kept, file)
    return count


def read_blocks(file: Path) -> dict[str, Quantized]:
    """By the layers' names. ModelRefused when the file is damaged."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelRefused(f"{file} cannot be read: {error}") from error
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if _DTYPES.get(part) is not tensor.dtype or tensor.dim() != 2:
            raise ModelRefused(f"{file}: {key} is {tensor.dtype} {list(tensor.shape)}")
        parts.setdefault(layer, {})[part] = tensor
    return {layer: _restored(file, layer, own) for layer, own in parts.items()}


def _names(layer: str) -> Iterator[str]:
    """Tensors of the file that may hold a layer's weights."""
    if layer == "lm_head":
        yield "output.weight"
        yield "token_embd.weight"  # tied
    _, _, rest = layer.partition("layers.")
    index, _, part = rest.partition(".")
    if part in _TENSORS:
        yield f"blk.{index}.{_TENSORS[part]}.weight"


def _blocks_of(tensor: Any) -> Quantized | None:
    if tensor is None:
        return None
    rows = np.asarray(tensor.data)
    kind = tensor.tensor_type.name
    if kind == "Q8_0":
        blocks = rows.reshape(len(rows), -1, 2 + GROUP)
        codes = blocks[..., 2:].reshape(len(rows), -1).view(np.int8)
        if bool((codes == -128).any()):
            return None  # beyond what a code may be
        return Quantized(torch.from_numpy(codes.copy()), _halves(blocks[..., :2]), None)
    if kind == "Q4_1":
        blocks = rows.reshape(len(rows), -1, 4 + GROUP // 2)
        pairs = blocks[..., 4:]
        codes = np.concatenate([pairs & 15, pairs >> 4], axis=-1).reshape(len(rows), -1)
        return Quantized(
            torch.from_numpy(codes), _halves(blocks[..., :2]), _halves(blocks[..., 2:4])
        )
    return None


def _halves(pairs: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pairs).view(np.float16)[..., 0].copy())


def _in_order(quantized: Quantized, layer: nn.Linear, model: Any) -> Quantized | None:
    """The blocks with their rows as the layer has them; None when they are not the layer's.

    Files of Llama-like models keep the rows of queries and keys in another order: the two halves
    of a head, which are rotated together, alternate there.
    """
    if quantized.codes.shape != layer.weight.shape:
        return None
    orders = [torch.arange(len(quantized.codes))]
    config = model.config.get_text_config(decoder=True)
    for heads in {config.num_attention_heads, config.num_key_value_heads}:
        if len(quantized.codes) % (2 * heads) == 0:
            orders.append(orders[0].view(heads, -1, 2).transpose(1, 2).reshape(-1))
    for order in orders:
        minima = None if quantized.minima is None else quantized.minima[order]
        ordered = Quantized(quantized.codes[order], quantized.scales[order], minima)
        if torch.equal(dequantize(ordered).to(layer.weight.dtype), layer.weight.detach()):
            return ordered
    return None


def _stored(name: str, quantized: Quantized) -> dict[str, torch.Tensor]:
    if quantized.minima is None:
        return {f"{name}.codes8": quantized.codes, f"{name}.scales": quantized.scales}
    pairs = quantized.codes[:, ::2] | (quantized.codes[:, 1::2] << 4)
    return {
        f"{name}.codes4": pairs,
        f"{name}.scales": quantized.scales,
        f"{name}.minima": quantized.minima,
    }


def _restored(file: Path, layer: str, parts: Mapping[str, torch.Tensor]) -> Quantized:
    scales = parts.get("scales")
    if "codes8" in parts and scales is not None and "minima" not in parts:
        quantized = Quantized(parts["codes8"], scales, None)
    elif "codes4" in parts and scales is not None and "minima" in parts:
        pairs = parts["codes4"]
        codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
        quantized = Quantized(codes, scales, parts["minima"])
    else:
        raise ModelRefused(f"{file}: {layer} has {', '.join(sorted(parts))} alone")
    n, k = quantized.codes.shape
    for own in (quantized.scales, quantized.minima):
        if own is not None and own.shape != (n, k // GROUP):
            raise ModelRefused(f"{file}: {layer} has scales of another shape than its codes")
    if k % GROUP or (quantized.minima is None and bool((quantized.codes == -128).any())):
        raise ModelRefused(f"{file}: {layer} has codes that no layer can have")
    return quantized
