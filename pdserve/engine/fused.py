"""Runs all layers of a Llama-like model in one native call for each step (kernels/decoder.h).

    why_not_fused(loaded, library) -> ""     the model is one of those whose layers we know
    decoder = FusedDecoder(loaded, pool, library)
    decoder.forward(plan, places) -> logits

Between transformers' layers lie hundreds of small operations; here a step is one call, which works
on the packed weights, the pool and the step's plan in place. Transformers' own layers over
attention.py compute the same and are the reference; they serve every other model, and this one
wherever its weights are not packed for our kernels (linear.py).
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from ctypes import CDLL, Array, c_int32
from typing import Any

import torch
import transformers

from pdserve.engine.model import LoadedModel
from pdserve.engine.native import Layer, NativeStep, Step, native_layer
from pdserve.engine.plan import StepPlan
from pdserve.engine.pool_view import PoolView
from pdserve.engine.quantized_linear import QuantizedLinear
from pdserve.engine.tiles import PANEL, Linear, TiledLinear
from pdserve.engine.turns import Turn

log = logging.getLogger(__name__)

# Norm, attention with rotated queries and keys, norm, gated SiLU; nothing else in between.
FAMILIES = (
    transformers.LlamaForCausalLM,
    transformers.MistralForCausalLM,
    transformers.Qwen2ForCausalLM,
    transformers.Qwen3ForCausalLM,
)
LARGEST_HEAD = 256
TELL_EVERY_S = 60.0
_PACKED = TiledLinear | QuantizedLinear
# Rotations that depend on more than a token's position.
_CHANGING_ROPE = ("dynamic", "longrope")


class _DecoderLayer(ctypes.Structure):
    _fields_ = (
        ("norm_in", ctypes.c_void_p),
        ("norm_mid", ctypes.c_void_p),
        ("norm_query", ctypes.c_void_p),
        ("norm_key", ctypes.c_void_p),
        ("query", Linear),
        ("key", Linear),
        ("value", Linear),
        ("output", Linear),
        ("gate", Linear),
        ("up", Linear),
        ("down", Linear),
        ("kv", Layer),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("epsilon", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("norm_out", ctypes.c_void_p),
        ("head", Linear),
    )


class _LongRow(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("table", ctypes.c_void_p),
    )


class _DecoderStep(ctypes.Structure):
    _fields_ = (
        ("step", Step),
        ("longs", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("mixed", ctypes.c_void_p),
        ("attended", ctypes.c_void_p),
        ("active", ctypes.c_void_p),
        ("wanted", ctypes.c_int64),
        ("places", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("turn", ctypes.c_void_p),
        ("cores", ctypes.c_void_p),
    )


def why_not_fused(loaded: LoadedModel) -> str:
    """Why transformers' layers have to run one by one; empty when they need not."""
    model = loaded.model
    if type(model) not in FAMILIES:
        return f"{type(model).__name__} is not among the models whose layers are known"
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear | _PACKED)]
    if not linears or not all(isinstance(m, _PACKED) for m in linears):
        return "its weights are not packed for the native kernels"
    head = model.get_output_embeddings()
    if any(m.out_features % PANEL for m in linears if m is not head):
        return f"a layer's width is no multiple of {PANEL}"
    first = loaded.layers[0]
    for layer in loaded.layers:
        if layer.window or layer.softcap or layer.shape != first.shape:
            return "its layers attend with a window or a soft cap, or differ"
    size = first.shape.key_size
    if size != first.shape.value_size or size % PANEL or size > LARGEST_HEAD:
        return f"heads of {size} are no multiple of {PANEL} up to {LARGEST_HEAD}"
    if tuple(layer.self_attn for layer in model.model.layers) != loaded.modules:
        return "its layers are not called in their order"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}"
    if model.model.rotary_emb.rope_type in _CHANGING_ROPE:
        return "its rotation changes with the length"
    return ""


class FusedDecoder:
    """A model for which ``why_not_fused`` has no reason, bound to one pool."""

    def __init__(
        self, loaded: LoadedModel, pool: PoolView, library: CDLL, turn: Turn | None = None
    ) -> None:
        assert pool.blocks.dtype is torch.bfloat16
        model = loaded.model
        self._embed = model.model.embed_tokens
        self._rotary = model.model.rotary_emb
        self._cores: Array[c_int32] | None = None
        self._function = library.pdserve_decoder_step
        # What enters a product: bfloat16 where the processor multiplies it, else float.
        self._input = torch.bfloat16 if library.pdserve_input_bytes() == 2 else torch.float32
        self._turn = turn  # taken for each step
        self._forced, self._tell_again = 0, 0.0
        self._pool = pool  # keeps the memory alive that the kernel is given
        self._kept: list[torch.Tensor] = []  # and the norms in float
        first, shape = model.model.layers[0], loaded.layers[0].shape
        self._vocab = loaded.vocab_size
        self._mixed = (loaded.layers[0].query_heads + 2 * shape.heads) * shape.key_size
        self._attended = loaded.layers[0].query_heads * shape.key_size
        self._inner = first.mlp.gate_proj.out_features
        self._layers = (_DecoderLayer * len(loaded.layers))(
            *(
                self._layer(layer, native_layer(pool, span))
                for layer, span in zip(model.model.layers, pool.layout.layers, strict=True)
            )
        )
        self._decoder = _Decoder(
            layers=ctypes.addressof(self._layers),
            count=len(loaded.layers),
            width=first.self_attn.q_proj.in_features,
            heads=loaded.layers[0].query_heads,
            epsilon=model.model.norm.variance_epsilon,
            scale=first.self_attn.scaling,
            norm_out=self._norm(model.model.norm),
            head=model.get_output_embeddings().struct,
        )
        self._model = model  # keeps the packed weights

    def keep_to_cores(self) -> None:
        """From now on the threads of a step keep to a core each; the calling one computes them.

        Where there is not exactly one for each the system goes on to choose.
        """
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) == torch.get_num_threads():
            self._cores = (c_int32 * len(cores))(*cores)

    def forward(self, plan: StepPlan, places: torch.Tensor) -> torch.Tensor:
        """Float logits [len(places), vocabulary] at those places of the line; writes the KV."""
        count = plan.size
        assert len(places) <= count, "the kernel has room for one row a token"
        tokens, positions = torch.from_numpy(plan.tokens), torch.from_numpy(plan.positions)
        stream = self._embed(tokens).float()
        cosines, sines = self._rotation(stream, positions)
        mixed = torch.empty((count, self._mixed), dtype=torch.bfloat16)
        normed, attended, active = (
            torch.empty((count, width), dtype=self._input)
            for width in (stream.shape[1], self._attended, self._inner)
        )
        logits = torch.empty((len(places), self._vocab))
        rows = (_LongRow * len(plan.long_rows))(
            *(
                _LongRow(row.begin, row.end, row.start, row.table.ctypes.data)
                for row in plan.long_rows
            )
        )
        call = _DecoderStep(
            step=NativeStep(plan).struct,
            longs=len(rows),
            rows=ctypes.addressof(rows),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            stream=stream.data_ptr(),
            normed=normed.data_ptr(),
            mixed=mixed.data_ptr(),
            attended=attended.data_ptr(),
            active=active.data_ptr(),
            wanted=len(places),
            places=places.data_ptr(),
            logits=logits.data_ptr(),
            turn=None if self._turn is None else ctypes.addressof(self._turn.struct),
            cores=None if self._cores is None else ctypes.addressof(self._cores),
        )
        self._function(ctypes.byref(self._decoder), ctypes.byref(call))
        if self._turn is not None and self._turn.forced > self._forced:
            self._tell_of_forced(self._turn)
        return logits

    def _tell_of_forced(self, turn: Turn) -> None:
        """At most once in a while: an engine that is stuck in its turn costs speed, no more."""
        now = time.monotonic()
        if now >= self._tell_again:
            count = turn.forced - self._forced
            log.warning("computed out of turn %d times: another engine holds the cores", count)
            self._forced, self._tell_again = turn.forced, now + TELL_EVERY_S

    def _rotation(
        self, like: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Float cosines and sines [T, size / 2]; both halves of a head turn by the same angles."""
        cosines, sines = self._rotary(like, positions[None])
        half = cosines.shape[-1] // 2
        return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()

    def _layer(self, layer: Any, kv: Layer) -> _DecoderLayer:
        attention, mlp = layer.self_attn, layer.mlp
        query_norm = getattr(attention, "q_norm", None)
        key_norm = getattr(attention, "k_norm", None)
        return _DecoderLayer(
            norm_in=self._norm(layer.input_layernorm),
            norm_mid=self._norm(layer.post_attention_layernorm),
            norm_query=None if query_norm is None else self._norm(query_norm),
            norm_key=None if key_norm is None else self._norm(key_norm),
            query=attention.q_proj.struct,
            key=attention.k_proj.struct,
            value=attention.v_proj.struct,
            output=attention.o_proj.struct,
            gate=mlp.gate_proj.struct,
            up=mlp.up_proj.struct,
            down=mlp.down_proj.struct,
            kv=kv,
        )

    def _norm(self, norm: Any) -> int:
        weight = norm.weight.detach().float().contiguous()
        self._kept.append(weight)
        return int(weight.data_ptr())
