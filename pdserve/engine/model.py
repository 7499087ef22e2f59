"""Loading a model, and finding out everything about it that serving depends on.

    load_model(...)  config checked -> weights read, packed or quantized, or mapped where another
                     worker did that (shared_weights.py) -> traced -> LoadedModel

Only local folders, only safetensors, never code that comes with a model. The returned model runs
only inside PagedAttention.step (attention.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pdserve.engine import attention, trace
from pdserve.engine.gguf_blocks import blocks_file
from pdserve.engine.layout import LayerShape
from pdserve.engine.linear import LinearPacker, can_pack
from pdserve.engine.load_weights import read_model
from pdserve.engine.pool_view import TORCH_DTYPES
from pdserve.engine.quantized import GROUP, Quantization
from pdserve.engine.quantized_linear import QuantizedLayers, quantize_linears
from pdserve.engine.quiet import first_line
from pdserve.engine.refusal import check_config, context_length
from pdserve.engine.shared_weights import Recipe, Weighted, load_shared
from pdserve.errors import ConfigError, ModelRefused
from pdserve.types import Numerics

TRACE_TOKENS = 6
# Parts of a configuration that say nothing about what is computed.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Any  # a transformers causal language model, under our attention
    layers: tuple[trace.TracedLayer, ...]  # in the order in which a pass calls them
    dtype: str
    numerics: Numerics
    device: torch.device
    max_model_len: int
    vocab_size: int  # width of the logits
    weights_bytes: int  # what the weights take in memory
    weights_mapped: bool  # that memory is one copy of all workers of the host
    weights_note: str  # whether and how they are quantized
    identity: Mapping[str, object]  # of the fingerprint
    takes_positions: bool  # forward() computes logits only where logits_to_keep says

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        return tuple(layer.shape for layer in self.layers)

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return tuple(layer.module for layer in self.layers)


def load_model(
    path: Path,
    *,
    dtype: str,
    numerics: Numerics,
    device: torch.device,
    quantization: Quantization = Quantization.NONE,
    max_model_len: int = 0,
    pack: bool = True,
    library: CDLL | None = None,
    shared: Path | None = None,
) -> LoadedModel:
    """``max_model_len`` 0 takes the model's own. ``library``: the native kernels, for packing.
    ``shared``: a folder where workers of this host keep packed weights for each other.

    ModelRefused (with the reason), ConfigError.
    """
    config = _read_config(path)
    check_config(config)
    length = _model_length(config, max_model_len)
    packer = None
    if pack and numerics is Numerics.FAST and can_pack(TORCH_DTYPES[dtype], device, library):
        packer = LinearPacker(library)

    def make() -> Weighted:
        return _weighted(path, config, TORCH_DTYPES[dtype], device, quantization, packer, library)

    if shared is not None and library is not None and packer is not None and packer.tiles:
        recipe = Recipe(path, config, quantization, library)
        weighted = load_shared(shared, recipe, make)
    else:
        weighted = make()
    model = weighted.model
    layers = trace_model(model, length)
    _set_implementation(model, attention.IMPLEMENTATION)
    return LoadedModel(
        model=model,
        layers=layers,
        dtype=dtype,
        numerics=numerics,
        device=device,
        max_model_len=length,
        vocab_size=_vocab_size(model, config),
        weights_bytes=_bytes_of(model) + weighted.packed_bytes,
        weights_mapped=weighted.mapped,
        weights_note=weighted.note,
        identity=_identity(config, weighted.revision, dtype, numerics, quantization),
        takes_positions="logits_to_keep" in inspect.signature(model.forward).parameters,
    )


def _read_config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is no model folder: it has no config.json", param="model.path")
    try:
        return transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelRefused(f"{path / 'config.json'}: {first_line(error)}") from error


def _model_length(config: Any, wanted: int) -> int:
    own = context_length(config)
    if own is None:
        if not wanted:
            raise ConfigError(
                "the model does not say how long its context is; set model.max_model_len",
                param="model.max_model_len",
            )
        return wanted
    if wanted > own:
        raise ConfigError(
            f"model.max_model_len is {wanted}, the model was made for {own} positions",
            param="model.max_model_len",
        )
    return wanted or own


def _weighted(
    path: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization,
    packer: LinearPacker | None,
    library: CDLL | None,
) -> Weighted:
    """From the model's own files; packed by ``packer`` if there is one."""
    plain = quantization is not Quantization.NONE
    read = read_model(path, config, dtype, device, None if plain else packer)
    done = QuantizedLayers()
    if plain:
        done = _quantize(read.model, path, quantization, None if packer is None else library)
        if packer is not None:
            packer.replace_all(read.model)
    # Embeddings tied to the output layer stay beside its packed form.
    packed_bytes = done.packed_bytes + (packer.packed_bytes if packer is not None else 0)
    note = _note(quantization, done)
    return Weighted(read.model, read.revision + done.revision, packed_bytes, note)


def _quantize(
    model: Any, path: Path, quantization: Quantization, library: CDLL | None
) -> QuantizedLayers:
    done = quantize_linears(model, quantization, blocks_file(path), library)
    if not done.layers:
        raise ConfigError(
            f"model.quantization is {quantization.value}, but no linear layer of this "
            f"{model.config.model_type} model has a multiple of {GROUP} inputs; set it to none",
            param="model.quantization",
        )
    return done


def _note(quantization: Quantization, done: QuantizedLayers) -> str:
    """For the log."""
    if quantization is Quantization.NONE:
        return "weights: not quantized"
    how = "in the native kernels" if done.packed_bytes else "dequantized at load, no kernel here"
    own = f"{done.taken} of {done.layers} from the file's own blocks"
    return f"weights: {quantization.value} in {done.layers} linear layers, {own}, {how}"


def trace_model(model: Any, max_model_len: int) -> tuple[trace.TracedLayer, ...]:
    """Runs a transformers causal language model once, to see what its attention is asked to do.

    Leaves the model under the traced attention. ModelRefused with the reason.
    """
    attention.register()
    trace.register()
    _set_implementation(model, trace.IMPLEMENTATION)
    count = min(TRACE_TOKENS, max_model_len)
    tokens = torch.arange(1, count + 1, device=model.device)[None]
    with torch.inference_mode(), trace.Tracer(max_model_len) as tracer:
        model(input_ids=tokens, position_ids=tokens - 1, use_cache=False)
    layers = tracer.layers()
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(layers) != expected:
        raise ModelRefused(
            f"{model.config.model_type} has {expected} layers, but {len(layers)} of them attend "
            "through transformers' attention interface"
        )
    return layers


def _set_implementation(model: Any, name: str) -> None:
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelRefused(
            f"{type(model).__name__} does not attend through transformers' attention interface"
        )


def _vocab_size(model: Any, config: Any) -> int:
    head = model.get_output_embeddings()
    width = getattr(head, "out_features", None) or config.get_text_config(decoder=True).vocab_size
    return int(width)


def _bytes_of(model: Any) -> int:
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _identity(
    config: Any, revision: str, dtype: str, numerics: Numerics, quantization: Quantization
) -> Mapping[str, object]:
    described = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    text = config.get_text_config(decoder=True)
    return {
        "model_type": config.model_type,
        "config": described,
        "weights": revision,
        "dtype": dtype,
        "numerics": numerics.value,
        "rope": getattr(text, "rope_parameters", None),
        "quantization": quantization.value,
    }
