"""Reasons, readable from a model's configuration alone, for which it cannot be served; pure.

What a configuration does not tell is found by running the model: trace.py looks at what its
attention is asked to do, probe.py at the numbers that come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pdserve.errors import ModelRefused

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
# Frequencies that change with the length of the longest row in the batch: a token's keys would
# depend on its neighbours, and cached blocks could not be shared.
BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def check_config(config: Any) -> None:
    """``config``: a transformers configuration. Raises ModelRefused with the reason."""
    text = config.get_text_config(decoder=True)
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelRefused(f"{kind} is an encoder-decoder model; only decoder-only ones are served")
    if getattr(text, "is_causal", True) is False or getattr(
        text, "use_bidirectional_attention", False
    ):
        raise ModelRefused(f"{kind} is configured with bidirectional attention")
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        raise ModelRefused(f"the weights of this {kind} model are quantized; not supported")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelRefused(f"{kind} shares keys and values between layers; not supported")
    for name in ("layer_types", "layers_block_type"):
        other = sorted(set(getattr(text, name, None) or ()) - ATTENTION_LAYERS)
        if other:
            raise ModelRefused(
                f"{kind} has layers whose state is no paged KV ({', '.join(map(str, other))})"
            )
    for rope in rope_types(text):
        if rope in BATCH_DEPENDENT_ROPE:
            raise ModelRefused(
                f"{kind} uses RoPE of type {rope}, whose frequencies depend on the batch"
            )


def rope_types(text: Any) -> Iterator[str]:
    """Every RoPE type in use: models have one set of parameters, or one for each layer type."""
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return
    for each in (parameters, *parameters.values()):
        if isinstance(each, Mapping) and each.get("rope_type"):
            yield str(each["rope_type"])


def context_length(config: Any) -> int | None:
    """Positions that the model was made for; None when its configuration does not say."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
