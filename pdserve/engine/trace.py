"""What a model's attention is really asked to do, found by running it once on a few tokens.

    with Tracer(max_model_len) as tracer: model(...)    under the attention named IMPLEMENTATION
    tracer.layers()                                     one per call, in the order of the calls

The traced run answers each call by plain causal attention on what it was given, and notes the
module, the shapes, the window and the softcap. A mask function is registered beside it: the rule
by which the model would have built its mask is compared, over positions up to the model's length,
with the rule that the paged attention follows. Anything that the paged attention does not
implement raises ModelRefused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pdserve.engine.gather import MaskCache, attend_row
from pdserve.engine.layout import LayerShape
from pdserve.errors import ModelRefused

IMPLEMENTATION = "pdserve_trace"

# (batch, head, query position, key position), index tensors of one shape -> True where seen
MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Keyword arguments that do not change what attention computes for a causal decoder at inference.
HARMLESS = frozenset(
    {
        "attention_mask",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "dropout",
        "is_causal",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "target_dtype",
        "training",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class TracedLayer:
    module: torch.nn.Module
    shape: LayerShape
    query_heads: int
    window: int  # 0: none
    softcap: float  # 0: none


_active: ContextVar[Tracer | None] = ContextVar("pdserve_tracer", default=None)


class Tracer:
    """Collects the attention calls of one forward pass."""

    def __init__(self, max_model_len: int) -> None:
        self._max_model_len = max_model_len
        self._calls: list[TracedLayer] = []
        self._rules: list[tuple[torch.Tensor, MaskRule]] = []
        self._checked: set[tuple[int, int]] = set()
        self._keys: list[torch.Tensor] = []  # kept, so that equal addresses mean shared keys
        self._token: Token[Tracer | None] | None = None

    def __enter__(self) -> Tracer:
        self._token = _active.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._token is not None
        _active.reset(self._token)
        self._rules.clear()
        self._keys.clear()

    def layers(self) -> tuple[TracedLayer, ...]:
        return tuple(self._calls)

    def note_mask(self, mask: torch.Tensor, rule: MaskRule) -> None:
        self._rules.append((mask, rule))

    def note_call(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        window: int,
        softcap: float,
        extra: Mapping[str, Any],
    ) -> None:
        layer = len(self._calls)
        _check_call(layer, module, query, key, value, extra)
        if any(call.module is module for call in self._calls):
            raise ModelRefused(f"attention layer {layer} runs twice in one pass (shared layers)")
        if any(seen.data_ptr() == key.data_ptr() for seen in self._keys):
            raise ModelRefused(f"attention layer {layer} shares the keys of an earlier layer")
        self._keys.append(key)
        if mask is not None:
            self._check_mask(layer, mask, window)
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self._calls.append(TracedLayer(module, shape, query.shape[1], window, softcap))

    def _check_mask(self, layer: int, mask: torch.Tensor, window: int) -> None:
        rule = next((rule for seen, rule in self._rules if seen is mask), None)
        if rule is None:
            raise ModelRefused(
                f"attention layer {layer} uses a mask of the model's own making; only causal masks "
                "made by transformers' masking_utils can be served"
            )
        if (id(rule), window) not in self._checked:
            self._checked.add((id(rule), window))
            problem = compare_rule(rule, window, self._max_model_len)
            if problem:
                raise ModelRefused(f"attention layer {layer}: {problem}")


def compare_rule(rule: MaskRule, window: int, max_model_len: int) -> str:
    """Why the mask rule is not causal attention (with that window); empty when it is."""
    places = _sample_places(window, max_model_len)
    queries, keys = (grid.reshape(-1) for grid in torch.meshgrid(places, places, indexing="ij"))
    zero = torch.zeros_like(queries)
    seen = torch.as_tensor(rule(zero, zero, queries, keys)).expand(queries.shape)
    expected = keys <= queries
    if window:
        expected &= keys > queries - window
    wrong = torch.nonzero(seen != expected)
    if not len(wrong):
        return ""
    at = int(wrong[0, 0])
    verb = "sees" if bool(seen[at]) else "does not see"
    kind = f"causal with a window of {window}" if window else "causal"
    return (
        f"the model's mask is not {kind}: position {int(queries[at])} {verb} "
        f"position {int(keys[at])}"
    )


def _sample_places(window: int, max_model_len: int) -> torch.Tensor:
    """Positions where a mask rule may change its mind: small ones, powers of two, the window."""
    places = set(range(33)) | {max_model_len - 1}
    for base in (*(2**k for k in range(5, 24)), window, 2 * window, max_model_len - window):
        places |= {base - 1, base, base + 1}
    return torch.tensor(sorted(p for p in places if 0 <= p < max_model_len))


def _check_call(
    layer: int,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    extra: Mapping[str, Any],
) -> None:
    if not getattr(module, "is_causal", True) or extra.get("is_causal") is False:
        raise ModelRefused(f"attention layer {layer} is not causal")
    unknown = sorted(
        name for name, given in extra.items() if given is not None and name not in HARMLESS
    )
    if unknown:
        raise ModelRefused(
            f"attention layer {layer} asks for what the paged attention does not implement: "
            + ", ".join(unknown)
        )
    if query.shape[2] != key.shape[2] or key.shape[:3] != value.shape[:3]:
        raise ModelRefused(
            f"attention layer {layer} attends {query.shape[2]} queries to {key.shape[2]} keys and "
            f"{value.shape[2]} values in a first pass (cross-attention or learned keys)"
        )
    if query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
        raise ModelRefused(
            f"attention layer {layer} has {query.shape[1]} query heads of size {query.shape[3]} "
            f"for {key.shape[1]} key heads of size {key.shape[3]}"
        )


def trace_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    tracer = _active.get()
    assert tracer is not None, "traced attention ran outside of a trace"
    window, cap = sliding_window or 0, softcap or 0.0
    tracer.note_call(module, query, key, value, attention_mask, window, cap, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend_row(query[0], key[0], value[0], 0, MaskCache(), scale, window, cap)
    return out.contiguous()[None], None


def trace_mask(mask_function: MaskRule, **kwargs: Any) -> torch.Tensor:
    tracer = _active.get()
    assert tracer is not None, "a traced mask was asked for outside of a trace"
    # Never skipped: the mask itself tells which rule a layer was given.
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(mask_function=mask_function, **kwargs)
    assert mask is not None
    tracer.note_mask(mask, mask_function)
    return mask


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, trace_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, trace_mask)
