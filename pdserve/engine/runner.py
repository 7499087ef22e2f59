"""Runs a loaded model over a KV pool, one step of packed rows at a time (the Runner of step.py).

All rows of a step go through the model as one line of tokens; attention finds each token's blocks
by the step's plan. Logits are computed only where something reads them, and sampled in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL
from typing import Any

import torch

from pdserve.engine.attention import PagedAttention
from pdserve.engine.decode_graph import Capture, DecodeGraphs
from pdserve.engine.device_plan import DevicePlan
from pdserve.engine.fused import FusedDecoder, why_not_fused
from pdserve.engine.model import LoadedModel
from pdserve.engine.plan import StepPlan, plan_step, wanted_logits
from pdserve.engine.pool_view import PoolView
from pdserve.engine.sampler import TokenSampler
from pdserve.engine.step import Row, RowResult, SamplerState
from pdserve.engine.triton_layer import TritonKernels
from pdserve.engine.turns import Turn
from pdserve.types import Sampling, TokenLogprob, TokenOut


class ModelRunner:
    """Owns the model's binding to one pool. Called on the engine's thread alone."""

    def __init__(
        self,
        loaded: LoadedModel,
        pool: PoolView,
        library: CDLL | TritonKernels | None,
        turn: Turn | None = None,
        pin: bool = False,
    ) -> None:
        """``library``: the kernels of attention; None gathers. ``turn``: fused steps take it.

        ``pin``: an engine's thread and its helpers keep to one core each, once it begins.
        """
        self._loaded = loaded
        self._pool = pool
        self._attention = PagedAttention(loaded.modules, pool, library)
        self._sampler = TokenSampler(loaded.vocab_size)
        self._decoder = _decoder_of(loaded.model)
        reason = why_not_fused(loaded)
        self._fused: FusedDecoder | None = None
        if isinstance(library, CDLL) and not reason:
            self._fused = FusedDecoder(loaded, pool, library, turn)
        self._pin = pin
        self.layers_note = f"one by one, because {reason}" if reason else "fused"
        self._graphs: DecodeGraphs | None = None

    def use_graphs(self, capture: Capture, most_rows: int) -> None:
        """From now on steps of at most so many single tokens are replayed where they can be."""
        loaded = self._loaded
        width = self._pool.layout.blocks_for(loaded.max_model_len)
        self._graphs = DecodeGraphs(
            self._graph_pass, capture, loaded.device, most_rows, min(width, self._pool.num_blocks)
        )
        with torch.inference_mode():
            self._graphs.prepare()

    @property
    def notes(self) -> tuple[str, ...]:
        """How it computes, a line each."""
        layers = f"layers: {self.layers_note}"
        if self._graphs is None:
            return (layers,)
        reason = self._graphs.reason
        return (layers, f"decode steps: {reason or 'replayed from graphs'}")

    def begin(self) -> None:
        if self._pin and self._fused is not None:
            self._fused.keep_to_cores()

    def open_sampler(
        self, sampling: Sampling, token_ids: Sequence[int], prompt_len: int
    ) -> SamplerState:
        return self._sampler.open(sampling, token_ids, prompt_len)

    def finish(self) -> None:
        """Waits until the device has computed the step: then its blocks may be offered and copied.

        Raises where the device failed, for whatever reason.
        """
        if self._loaded.device.type == "cuda":
            torch.cuda.current_stream(self._loaded.device).synchronize()

    def zero_tail(self, block: int, used_tokens: int) -> None:
        self._pool.zero_tail(block, used_tokens)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        plan = plan_step(rows, self._pool.layout.block_size, self._attention.short_limit)
        wanted, counts = wanted_logits(rows, plan)
        places = torch.from_numpy(wanted)
        logits = self._forward(plan, places)
        states = [row.sampler for row in rows if row.sampler is not None]
        sampled = iter(self._sample(logits, states))
        parts = iter(torch.split(logits[len(states) :], list(counts[1:])) if counts[1:] else ())
        results = []
        for row in rows:
            token = next(sampled) if row.sampler is not None else None
            if row.prompt_logprobs is None:
                results.append(RowResult(token))
            else:
                results.append(RowResult(token, self._prompt_logprobs(row, next(parts))))
        return results

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [tokens, vocabulary] of every token of the rows, as the model's dtype."""
        plan = plan_step(rows, self._pool.layout.block_size, self._attention.short_limit)
        with torch.inference_mode():
            return self._forward(plan, torch.arange(plan.size))

    @property
    def attended(self) -> int:
        """How many layers attended over the pool in the last step."""
        return len(self._loaded.layers) if self._fused else self._attention.calls

    def detach(self) -> None:
        """Unbinds the model, so that another runner can bind it."""
        self._attention.detach()

    def _sample(self, logits: torch.Tensor, states: Sequence[SamplerState]) -> list[TokenOut]:
        if not states:
            return []
        return self._sampler.sample(logits[: len(states)], states)

    def _prompt_logprobs(self, row: Row, logits: torch.Tensor) -> tuple[TokenLogprob, ...]:
        if not len(row.targets):
            return ()
        assert row.prompt_logprobs is not None
        return self._sampler.prompt_logprobs(logits, row.targets, row.prompt_logprobs)

    def _forward(self, plan: StepPlan, places: torch.Tensor) -> torch.Tensor:
        """Logits [len(places), vocabulary] at those places of the line."""
        loaded = self._loaded
        if self._fused is not None:
            return self._fused.forward(plan, places)
        if self._graphs is not None and self._graphs.takes(plan, places):
            replayed = self._graphs.run(plan)
            if replayed is not None:
                return replayed
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(plan.tokens)[None].to(loaded.device),
            "position_ids": torch.from_numpy(plan.positions)[None].to(loaded.device),
            "use_cache": False,
        }
        with self._attention.step(plan):
            if not len(places) and self._decoder is not None:
                self._decoder(**inputs)  # a chunk in mid-prompt: only its KV is wanted
                return torch.empty((0, loaded.vocab_size))
            where = places.to(loaded.device)
            if loaded.takes_positions and len(places):
                inputs["logits_to_keep"] = where
                logits: torch.Tensor = loaded.model(**inputs).logits[0]
                return logits
            logits = loaded.model(**inputs).logits[0]
            return logits[where]

    def _graph_pass(self, step: DevicePlan) -> torch.Tensor:
        """Logits of every token of a step of single tokens, by what lies in its buffer alone."""
        with self._attention.step(None, step):
            logits: torch.Tensor = self._loaded.model(
                input_ids=step.tokens.long()[None],
                position_ids=step.positions.long()[None],
                use_cache=False,
            ).logits[0]
            return logits


def _decoder_of(model: Any) -> Any | None:
    """The model without its output layer, when it can be run by itself."""
    inner = model.base_model
    return inner if inner is not model else None
